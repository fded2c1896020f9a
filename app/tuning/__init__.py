"""The best exit and draft length for given prompts on this machine."""
