"""Generators: one file or folder per family."""
