"""Janus-Pro, text to image."""
