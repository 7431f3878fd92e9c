"""Kernels in Triton, for GPUs; each is imported, and Triton with it, when asked for."""
