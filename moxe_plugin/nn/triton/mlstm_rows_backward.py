"""The backward kernels of the mLSTM in its parallel form on ragged rows.

Formulas and names are in :mod:`moxe_plugin.nn.triton.mlstm_rows`; for the rest see
:mod:`moxe_plugin.nn.triton.mlstm_rows_kernels`.
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
def add_query_grads(  # type: ignore[no-untyped-def]  # as above
    totals,
    grads,
    from_norm,
    shift,
    t,
    start,
    k,
    v,
    small,
    stride_k,
    stride_v,
    length,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the block of keys from ``start`` gives to the gradients of queries."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s = start + tl.arange(0, BLOCK_S)
    vs = load_tiles(v, stride_v, s, s < length, D, BLOCK_D)
    a = tl.load(small + s, mask=s < length, other=0.0)

    grad = multiply_all(grads, vs, NUM, BLOCK_T, BLOCK_S, INTERPRETED, PRECISION)
    grad += from_norm[:, None]
    grad *= decays(a[None, :], shift[:, None], s[None, :], t[:, None], length)
    # Not before: they take the values' place in shared memory.
    ks = load_tiles(k, stride_k, s, s < length, D, BLOCK_D)
    return add_weighted(totals, grad, ks, NUM, INTERPRETED, PRECISION)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_rows_query_grad_kernel(  # type: ignore[no-untyped-def]  # as above
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
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute what the norm is to gradients, and the gradient of a block of queries."""
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

    peak = tl.load(small + plane + t, mask=valid, other=0.0)
    floor = tl.load(small + 2 * plane + t, mask=valid, other=1.0)
    denominator = tl.load(small + 3 * plane + t, mask=valid, other=1.0)

    norm = tl.maximum(tl.abs(denominator), floor) + eps
    is_floored = floor > tl.abs(denominator)
    grad_m = tl.where(is_floored, overlap * floor / norm, 0.0)
    from_norm = tl.where(denominator < 0.0, overlap, -overlap)
    from_norm = tl.where(is_floored, 0.0, from_norm)
    # exp(a - shift) is exp(a - A) / norm / sqrt(D).
    shift = peak + tl.log(norm / scale)
    grad_small += at
    tl.store(grad_small + t, grad_m, mask=valid)
    tl.store(grad_small + 2 * plane + t, from_norm, mask=valid)
    tl.store(grad_small + 3 * plane + t, shift, mask=valid)

    totals = zero_tiles(NUM, BLOCK_T, BLOCK_D)
    end = tl.minimum((block + 1) * BLOCK_T, length)
    if INTERPRETED:
        # The interpreter takes no tensor as the end of a range.
        start = 0
        while start < end:
            totals = add_query_grads(
                *(totals, grads, from_norm, shift, t, start, k, v, small),
                *(stride_k, stride_v, length),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )
            start += BLOCK_S
    else:
        for start in range(0, end, BLOCK_S):
            totals = add_query_grads(
                *(totals, grads, from_norm, shift, t, start, k, v, small),
                *(stride_k, stride_v, length),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )

    store_tiles(grad_q, stride_grad_q, t, valid, totals, D, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def add_key_value_grads(  # type: ignore[no-untyped-def]  # as above
    totals,
    xs,
    is_key,
    a,
    s,
    start,
    y,
    z,
    grad_small,
    stride_y,
    stride_z,
    plane,
    length,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the block of queries from ``start`` gives to gradients."""
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = start + tl.arange(0, BLOCK_T)
    valid = t < length
    ys = load_tiles(y, stride_y, t, valid, D, BLOCK_D)
    from_norm = tl.load(grad_small + 2 * plane + t, mask=valid & is_key, other=0.0)
    shift = tl.load(grad_small + 3 * plane + t, mask=valid, other=0.0)

    # Queries first: a thread has few rows, and what it knows of each is in registers.
    weights = multiply_all(ys, xs, NUM, BLOCK_T, BLOCK_S, INTERPRETED, PRECISION)
    weights += from_norm[:, None]
    weights *= decays(a[None, :], shift[:, None], s[None, :], t[:, None], length)
    weights = tl.trans(weights.to(z.dtype.element_ty))
    # Not before: they take the place of the others in shared memory.
    zs = load_tiles(z, stride_z, t, valid, D, BLOCK_D)
    return add_weighted(totals, weights, zs, NUM, INTERPRETED, PRECISION)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_rows_key_value_grad_kernel(  # type: ignore[no-untyped-def]  # as above
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
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradient of a block of keys, and of a, or of a block of values.

    Two programs, as both gradients at once would not fit in registers. They differ in
    what is multiplied: ``<v_s, dh_t>`` weighs ``q_t``, ``<k_s, q_t>`` weighs ``dh_t``.
    """
    NUM: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, begin, length, head, at = place(begins, 2 * num_blocks, num_rows)
    block, is_key = own // 2, own % 2 == 0
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
    x, stride_x = tl.where(is_key, v, k), tl.where(is_key, stride_v, stride_k)
    y, stride_y = tl.where(is_key, grad_h, q), tl.where(is_key, stride_grad_h, stride_q)
    z, stride_z = tl.where(is_key, q, grad_h), tl.where(is_key, stride_q, stride_grad_h)

    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < length
    xs = load_tiles(x, stride_x, s, valid, D, BLOCK_D)
    a = tl.load(small + s, mask=valid, other=0.0)

    totals = zero_tiles(NUM, BLOCK_S, BLOCK_D)
    # Where the block of queries begins that has the first key.
    first = block * BLOCK_S // BLOCK_T * BLOCK_T
    if INTERPRETED:
        # The interpreter takes no tensor as the end of a range.
        start = first
        while start < length:
            totals = add_key_value_grads(
                *(totals, xs, is_key, a, s, start, y, z, grad_small),
                *(stride_y, stride_z, plane, length),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )
            start += BLOCK_T
    else:
        # What is moved out of this loop would not fit in registers beside it.
        for start in tl.range(first, length, BLOCK_T, disable_licm=True):
            totals = add_key_value_grads(
                *(totals, xs, is_key, a, s, start, y, z, grad_small),
                *(stride_y, stride_z, plane, length),
                *(D, BLOCK_T, BLOCK_S, BLOCK_D, INTERPRETED, PRECISION),
            )

    if is_key:
        store_tiles(grad_k, stride_grad_k, s, valid, totals, D, BLOCK_D)
        ks = load_tiles(k, stride_k, s, valid, D, BLOCK_D)
        grad_a = tl.zeros((BLOCK_S,), tl.float32)
        for i in tl.static_range(NUM):
            grad_a += tl.sum(totals[i] * ks[i].to(tl.float32), 1)
        tl.store(grad_small + plane + s, grad_a, mask=valid)
    else:
        store_tiles(grad_v, stride_grad_v, s, valid, totals, D, BLOCK_D)
