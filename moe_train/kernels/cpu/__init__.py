"""Kernels in C for CPUs that multiply in BF16 (AVX512-BF16), compiled where they run.

library.py finds a compiler and decides whether they are used; experts.py and attention.py call them; products.h has the
products that both are made of. Without a compiler torch's operations do the same, to rounding.
"""
