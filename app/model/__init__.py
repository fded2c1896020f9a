"""Hugging Face decoders made droppable, tappable and runnable in spans."""
