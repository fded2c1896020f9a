"""Hugging Face decoders whose blocks can be dropped and split over ranks, and whose exits can be tapped."""
