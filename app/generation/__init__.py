"""A model and its tokenizer, loaded to continue prompts."""
