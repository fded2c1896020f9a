"""LayerSkip in PyTorch Lightning: train Llama models that can stop early, and decode them faster at no loss."""
