"""Turns text into token ids and back: tokenizers, the tokens around a text, text that arrives token by token."""
