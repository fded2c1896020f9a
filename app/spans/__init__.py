"""Runs blocks start..stop of a Hugging Face decoder on a cache of our own, for decoding."""
