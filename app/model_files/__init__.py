"""Models in: Hugging Face directories and hub ids, .gguf files, checkpoints of ours."""
