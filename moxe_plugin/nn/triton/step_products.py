"""Products of one token with the weights of its expert, in Triton.

A *unit* is a token and the block that reads it: an expert of a bank, of which every
token has K, or a block that stands alone. Few tokens are read at a time, so what a
product costs is to read its weight once; nothing is shared between units.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.gate_functions import silu
from moxe_plugin.nn.triton.launching import Launcher


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def find_unit(experts, first, K, HAS_EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Tell a program its unit, the expert's number in the bank, and the token.

    An expert elsewhere, or none, is none of the bank's numbers.
    """
    unit = tl.program_id(0).to(tl.int64)
    expert = unit * 0
    if HAS_EXPERTS:
        expert = tl.load(experts + unit) - first
    return unit, expert, unit // K


@triton.jit
def multiply_tile(x, weight, rows, cols, mask):  # type: ignore[no-untyped-def]  # as above
    """Multiply a vector with a tile of a weight, ``(A) (A,B) -> (B)``, in float32.

    ``rows`` are where rows begin in the weight, ``cols`` the columns in them.
    """
    at = weight + rows[:, None] + cols[None, :]
    tile = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(x[:, None] * tile, 0)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def find_moments(x, valid, SIZE: tl.constexpr, eps):  # type: ignore[no-untyped-def]  # as above
    """Compute the mean of ``SIZE`` values, and one over their standard deviation."""
    mean = tl.sum(tl.where(valid, x, 0.0), 0) / SIZE
    centered = tl.where(valid, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 0) / SIZE + eps)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def norm_product_kernel(  # type: ignore[no-untyped-def]  # as above
    tokens,
    norm,
    weight,
    experts,
    out,
    first,
    E,
    K,
    eps,
    M: tl.constexpr,
    O: tl.constexpr,  # noqa: E741  # the number of outputs
    POW_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Normalise a token and multiply it: ``(N,M) -> (U,O)``."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    x = tokens + row * M
    all_m = tl.arange(0, POW_M)
    whole = tl.load(x + all_m, mask=all_m < M, other=0.0).to(tl.float32)
    mean, inverse = find_moments(whole, all_m < M, M, eps)

    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        scale = tl.load(norm + expert * M + m, mask=m < M, other=0.0).to(tl.float32)
        part = tl.load(x + m, mask=m < M, other=0.0).to(tl.float32)
        # 0 beyond M, as the scale is
        part = (part - mean) * inverse * scale
        mask = (m < M)[:, None] & (o < O)[None, :]
        total += multiply_tile(part, weight, (expert * M + m) * O, o, mask)

    tl.store(out + unit * O + o, total, mask=o < O)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def gated_product_kernel(  # type: ignore[no-untyped-def]  # as above
    x,
    weight,
    experts,
    out,
    first,
    E,
    K,
    M: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute ``silu(x W_g) * (x W_v)`` of each unit: ``(U,M) -> (U,F)``."""
    unit, expert, _ = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    gate = tl.zeros((BLOCK_O,), tl.float32)
    value = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        part = tl.load(x + unit * M + m, mask=m < M, other=0.0)
        rows = (expert * M + m) * (2 * F)
        mask = (m < M)[:, None] & (o < F)[None, :]
        gate += multiply_tile(part, weight, rows, o, mask)
        value += multiply_tile(part, weight + F, rows, o, mask)

    tl.store(out + unit * F + o, silu(gate) * value, mask=o < F)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def residual_product_kernel(  # type: ignore[no-untyped-def]  # as above
    x,
    weight,
    residual,
    experts,
    out,
    first,
    E,
    K,
    units_per_residual,
    I: tl.constexpr,  # noqa: E741  # the inner width
    O: tl.constexpr,  # noqa: E741  # the number of outputs
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Multiply and add the residual: ``(U,I) -> (U,O)``."""
    unit, expert, _ = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    at = residual + unit // units_per_residual * O + o
    total = tl.load(at, mask=o < O, other=0.0).to(tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        part = tl.load(x + unit * I + i, mask=i < I, other=0.0)
        mask = (i < I)[:, None] & (o < O)[None, :]
        total += multiply_tile(part, weight, (expert * I + i) * O, o, mask)

    tl.store(out + unit * O + o, total.to(out.dtype.element_ty), mask=o < O)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def weighted_sum_kernel(  # type: ignore[no-untyped-def]  # as above
    outputs,
    expert_weights,
    experts,
    out,
    E,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum the weighted outputs of a token's experts: ``(N*K,M) -> (N,M)``."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(K):
        unit = row * K + k
        expert = tl.load(experts + unit)
        # Nothing was computed at an empty place.
        is_computed = (expert >= 0) & (expert < E)
        output = tl.load(outputs + unit * M + m, mask=(m < M) & is_computed, other=0.0)
        expert_weight = tl.load(expert_weights + unit).to(tl.float32)
        total += tl.where(is_computed, expert_weight, 0.0) * output

    tl.store(out + row * M + m, total.to(out.dtype.element_ty), mask=m < M)
