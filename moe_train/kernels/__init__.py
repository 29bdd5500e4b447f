"""Kernels written in Triton, each beside a plain PyTorch form of the same signature."""
