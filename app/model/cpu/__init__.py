"""Kernels for processors where PyTorch's are far from the fastest, each chosen by shapes and number types alone."""
