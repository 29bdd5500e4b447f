"""Kernels in C for CPUs that multiply in BF16 (AVX512-BF16), compiled where they run.

library.py finds a compiler and decides whether they are used; products.h has the products that all are made of,
chunks.h the order of tasks that depend on each other; each NAME.c has a NAME.py, which calls it. Without a compiler
torch's operations do the same, to rounding.
"""
