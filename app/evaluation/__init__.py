"""Measurements: exit quality, decoding comparison, and how to show them."""
