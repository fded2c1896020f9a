"""Autoregressive and self-speculative decoding over the ExitableDecoder protocol."""
