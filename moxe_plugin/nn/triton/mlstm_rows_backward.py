"""The backward kernels of the mLSTM in its parallel form on ragged rows.

Formulas and names are in :mod:`moxe_plugin.nn.triton.mlstm_rows`; for the rest see
:mod:`moxe_plugin.nn.triton.mlstm_rows_kernels`.
"""

import triton
import triton.language as tl

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
def normalizer_grads(denominator, floor, overlap, eps):  # type: ignore[no-untyped-def]  # as above
    """Compute ``1 / norm``, and the gradient of the denominator."""
    inverse = 1.0 / (tl.maximum(tl.abs(denominator), floor) + eps)
    sign = tl.where(denominator < 0.0, 1.0, -1.0)
    is_floored = floor > tl.abs(denominator)
    return inverse, tl.where(is_floored, 0.0, sign * overlap * inverse)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def add_query_grads(  # type: ignore[no-untyped-def]  # as above
    totals,
    grads,
    inverse,
    grad_denominator,
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
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the block of keys from ``start`` gives to the gradients of queries."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s = start + tl.arange(0, BLOCK_S)
    vs = load_tiles(v, stride_v, s, s < length, D, BLOCK_D)
    ks = load_tiles(k, stride_k, s, s < length, D, BLOCK_D)
    a = tl.load(small + s, mask=s < length, other=0.0)

    # The gradient of a weight, which is this pair's q.k times the decay
    grad = multiply_all(grads, vs, NUM, BLOCK_T, BLOCK_S, WIDE, PRECISION)
    grad = grad * inverse[:, None] + grad_denominator[:, None]
    decay = decays(a[None, :], peak[:, None], s[None, :], t[:, None], length)
    return add_weighted(totals, grad * decay * scale, ks, NUM, WIDE, PRECISION)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def query_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    k,
    v,
    begins,
    small,
    h,
    grad_h,
    grad_q,
    grad_small,
    stride_k,
    stride_v,
    stride_h,
    stride_grad_h,
    stride_grad_q,
    num_rows,
    num_blocks,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute ``<dh, h>`` and the gradient of a block of queries."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block, begin, length, head, at = place(begins, num_blocks, num_rows)
    if block * BLOCK_T >= length:
        return
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    small += at
    k += begin * stride_k + head * D
    v += begin * stride_v + head * D
    h += begin * stride_h + head * D
    grad_h += begin * stride_grad_h + head * D
    grad_q += begin * stride_grad_q + head * D

    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = t < length
    grads = load_tiles(grad_h, stride_grad_h, t, valid, D, BLOCK_D)
    hs = load_tiles(h, stride_h, t, valid, D, BLOCK_D)
    overlap = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(NUM):
        overlap += tl.sum(grads[i].to(tl.float32) * hs[i].to(tl.float32), 1)
    tl.store(grad_small + at + t, overlap, mask=valid)

    peak = tl.load(small + plane + t, mask=valid, other=0.0)
    floor = tl.load(small + 2 * plane + t, mask=valid, other=1.0)
    denominator = tl.load(small + 3 * plane + t, mask=valid, other=1.0)
    inverse, grad_denominator = normalizer_grads(denominator, floor, overlap, eps)

    totals = zero_tiles(NUM, BLOCK_T, BLOCK_D)
    end = tl.minimum((block + 1) * BLOCK_T, length)
    if INTERPRETED:
        # The interpreter takes no tensor as the end of a range.
        start = 0
        while start < end:
            totals = add_query_grads(
                *(totals, grads, inverse, grad_denominator, peak, t, start, k, v),
                *(small, stride_k, stride_v, length, scale),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, WIDE, PRECISION),
            )
            start += BLOCK_S
    else:
        for start in range(0, end, BLOCK_S):
            totals = add_query_grads(
                *(totals, grads, inverse, grad_denominator, peak, t, start, k, v),
                *(small, stride_k, stride_v, length, scale),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, WIDE, PRECISION),
            )

    store_tiles(grad_q, stride_grad_q, t, valid, totals, D, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def add_key_grads(  # type: ignore[no-untyped-def]  # as above
    key_grads,
    value_grads,
    grad_a,
    ks,
    vs,
    a,
    s,
    start,
    q,
    grad_h,
    small,
    grad_small,
    stride_q,
    stride_grad_h,
    plane,
    length,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the queries from ``start`` give to the gradients of keys and values."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = start + tl.arange(0, BLOCK_T)
    valid = t < length
    qs = load_tiles(q, stride_q, t, valid, D, BLOCK_D)
    grads = load_tiles(grad_h, stride_grad_h, t, valid, D, BLOCK_D)
    peak = tl.load(small + plane + t, mask=valid, other=0.0)
    floor = tl.load(small + 2 * plane + t, mask=valid, other=1.0)
    denominator = tl.load(small + 3 * plane + t, mask=valid, other=1.0)
    overlap = tl.load(grad_small + t, mask=valid, other=0.0)
    inverse, grad_denominator = normalizer_grads(denominator, floor, overlap, eps)

    # Keys first, so that no tile of weights has to be transposed.
    decay = decays(a[:, None], peak[None, :], s[:, None], t[None, :], length) * scale
    pairs = multiply_all(ks, qs, NUM, BLOCK_S, BLOCK_T, WIDE, PRECISION) * decay
    weights = pairs * inverse[None, :]
    value_grads = add_weighted(value_grads, weights, grads, NUM, WIDE, PRECISION)

    grad = multiply_all(vs, grads, NUM, BLOCK_S, BLOCK_T, WIDE, PRECISION)
    grad = grad * inverse[None, :] + grad_denominator[None, :]
    grad_a += tl.sum(grad * pairs, 1)
    key_grads = add_weighted(key_grads, grad * decay, qs, NUM, WIDE, PRECISION)
    return key_grads, value_grads, grad_a


@triton.jit  # type: ignore[untyped-decorator]  # as above
def key_value_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    q,
    k,
    v,
    begins,
    small,
    grad_h,
    grad_k,
    grad_v,
    grad_small,
    stride_q,
    stride_k,
    stride_v,
    stride_grad_h,
    stride_grad_k,
    stride_grad_v,
    num_rows,
    num_blocks,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute the gradients of a block of keys and values, and of a."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block, begin, length, head, at = place(begins, num_blocks, num_rows)
    if block * BLOCK_S >= length:
        return
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    small += at
    grad_small += at
    q += begin * stride_q + head * D
    k += begin * stride_k + head * D
    v += begin * stride_v + head * D
    grad_h += begin * stride_grad_h + head * D
    grad_k += begin * stride_grad_k + head * D
    grad_v += begin * stride_grad_v + head * D

    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < length
    ks = load_tiles(k, stride_k, s, valid, D, BLOCK_D)
    vs = load_tiles(v, stride_v, s, valid, D, BLOCK_D)
    a = tl.load(small + s, mask=valid, other=0.0)

    key_grads = zero_tiles(NUM, BLOCK_S, BLOCK_D)
    value_grads = zero_tiles(NUM, BLOCK_S, BLOCK_D)
    grad_a = tl.zeros((BLOCK_S,), tl.float32)
    # Where the block of queries begins that has the first key.
    first = block * BLOCK_S // BLOCK_T * BLOCK_T
    if INTERPRETED:
        # The interpreter takes no tensor as the end of a range.
        start = first
        while start < length:
            key_grads, value_grads, grad_a = add_key_grads(
                *(key_grads, value_grads, grad_a, ks, vs, a, s, start, q, grad_h),
                *(small, grad_small, stride_q, stride_grad_h, plane, length),
                *(scale, eps, D, BLOCK_T, BLOCK_S, BLOCK_D, WIDE, PRECISION),
            )
            start += BLOCK_T
    else:
        for start in range(first, length, BLOCK_T):
            key_grads, value_grads, grad_a = add_key_grads(
                *(key_grads, value_grads, grad_a, ks, vs, a, s, start, q, grad_h),
                *(small, grad_small, stride_q, stride_grad_h, plane, length),
                *(scale, eps, D, BLOCK_T, BLOCK_S, BLOCK_D, WIDE, PRECISION),
            )

    store_tiles(grad_k, stride_grad_k, s, valid, key_grads, D, BLOCK_D)
    store_tiles(grad_v, stride_grad_v, s, valid, value_grads, D, BLOCK_D)
    tl.store(grad_small + plane + s, grad_a, mask=valid)
