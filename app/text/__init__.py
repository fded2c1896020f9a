"""Text and token ids: tokenizers, where a text begins and ends, new tokens as text."""
