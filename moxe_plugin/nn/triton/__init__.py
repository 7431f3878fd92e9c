"""Kernels in Triton, for GPUs; each is imported, and Triton with it, when asked for.

Tests run them in Triton's interpreter on a CPU, and compile those with products for an
H100. They first ran on a GPU, an H200, on 2026-11-27: ``results/LOG.md`` has figures.
"""
