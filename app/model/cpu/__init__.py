"""Kernels for processors where PyTorch's are slow, each chosen by shapes and dtypes alone."""
