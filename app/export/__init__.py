"""Models out: a Hugging Face directory with its card."""
