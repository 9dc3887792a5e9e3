"""Emu3-Gen, text to image."""
