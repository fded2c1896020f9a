"""Ways to decode, measured in turn on the same prompts."""
