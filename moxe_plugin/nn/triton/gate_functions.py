"""Functions of gates, of whose exponents only those occur that cannot overflow.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]  # Triton's arguments have no type
    """Compute ``1 / (1 + exp(-x))``."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]  # as above
    """Compute ``x * sigmoid(x)``."""
    return x * sigmoid(x)


@triton.jit
def log_sigmoid(x):  # type: ignore[no-untyped-def]  # as above
    """Compute the logarithm of the sigmoid."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
