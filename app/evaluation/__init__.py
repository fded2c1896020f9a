"""Measures every exit of a model on tasks: multiple choice, perplexity, and what it generates."""
