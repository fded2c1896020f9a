"""Checkpoints: whole or absent, checked when read, and asked whether a run may go on from them."""
