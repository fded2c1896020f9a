"""Models out: Hugging Face directories with their cards."""
