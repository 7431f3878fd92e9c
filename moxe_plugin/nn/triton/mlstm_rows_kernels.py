"""The kernels of the mLSTM in its parallel form on ragged rows.

Formulas and names are in :mod:`moxe_plugin.nn.triton.mlstm_rows`. Imports triton, so it
is imported by who runs it only. A program has one block of positions, segment and head;
it keeps its own tiles, for all of D, and meets block after block of the other side.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.mlstm_rows_tiles import (
    add_weighted,
    decays,
    load_tiles,
    multiply_all,
    place,
    store_tiles,
    zero_tiles,
)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def add_keys(  # type: ignore[no-untyped-def]  # as above
    totals,
    denominator,
    qs,
    peak,
    t,
    start,
    k,
    v,
    small,
    stride_k,
    stride_v,
    length,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what queries get from the block of keys that begins at ``start``."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s = start + tl.arange(0, BLOCK_S)
    ks = load_tiles(k, stride_k, s, s < length, D, BLOCK_D)
    a = tl.load(small + s, mask=s < length, other=0.0)

    weights = multiply_all(qs, ks, NUM, BLOCK_T, BLOCK_S, INTERPRETED, PRECISION)
    weights *= scale
    weights *= decays(a[None, :], peak[:, None], s[None, :], t[:, None], length)
    # Not before: they take the keys' place in shared memory.
    vs = load_tiles(v, stride_v, s, s < length, D, BLOCK_D)
    totals = add_weighted(totals, weights, vs, NUM, INTERPRETED, PRECISION)
    return totals, denominator + tl.sum(weights, 1)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_rows_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    q,
    k,
    v,
    begins,
    small,
    h,
    stride_q,
    stride_k,
    stride_v,
    stride_h,
    num_rows,
    num_blocks,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the outputs and denominators of a block of queries."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block, begin, length, head, at = place(begins, num_blocks, num_rows)
    if block * BLOCK_T >= length:
        return
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    small += at
    k += begin * stride_k + head * D
    v += begin * stride_v + head * D

    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = t < length
    qs = load_tiles(q + begin * stride_q + head * D, stride_q, t, valid, D, BLOCK_D)
    peak = tl.load(small + plane + t, mask=valid, other=0.0)

    totals = zero_tiles(NUM, BLOCK_T, BLOCK_D)
    denominator = tl.zeros((BLOCK_T,), tl.float32)
    end = tl.minimum((block + 1) * BLOCK_T, length)
    if INTERPRETED:
        # The interpreter takes no tensor as the end of a range.
        start = 0
        while start < end:
            totals, denominator = add_keys(
                *(totals, denominator, qs, peak, t, start, k, v, small),
                *(stride_k, stride_v, length, scale),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )
            start += BLOCK_S
    else:
        for start in range(0, end, BLOCK_S):
            totals, denominator = add_keys(
                *(totals, denominator, qs, peak, t, start, k, v, small),
                *(stride_k, stride_v, length, scale),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )

    floor = tl.load(small + 2 * plane + t, mask=valid, other=1.0)
    inverse = 1.0 / (tl.maximum(tl.abs(denominator), floor) + eps)
    hs = ()
    for i in tl.static_range(NUM):
        hs = hs + (totals[i] * inverse[:, None],)  # type: ignore[assignment]  # noqa: RUF005  # as above
    store_tiles(h + begin * stride_h + head * D, stride_h, t, valid, hs, D, BLOCK_D)
    tl.store(small + 3 * plane + t, denominator, mask=valid)
