"""Measuring images: feature networks, metrics and reports."""
