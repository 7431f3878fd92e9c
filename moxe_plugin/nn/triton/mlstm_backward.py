"""The backward kernels of the chunkwise mLSTM; see :mod:`.mlstm` for the formulas.

Imports triton, so it is imported by who runs it only. Shapes as in
:mod:`moxe_plugin.nn.triton.mlstm_forward`; ``inverse`` is one over the normaliser.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.mlstm_forward import place, product


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def state_grad_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    q_ptr,
    grad_h_ptr,
    kept_ptr,
    inverse_ptr,
    grad_denominator_ptr,
    decay_ptr,
    lens_ptr,
    c_ptr,
    n_ptr,
    last_c_ptr,
    last_n_ptr,
    grad_last_c_ptr,
    grad_last_n_ptr,
    grad_c_ptr,
    grad_n_ptr,
    grad_c0_ptr,
    grad_n0_ptr,
    overlap_ptr,
    seq_len,
    num_chunks,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Run backwards with a tile of dC; store it after each chunk, and <dC, C>."""
    num_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, row = place(num_tiles * num_tiles)
    tile_k, tile_v = own // num_tiles, own % num_tiles
    length = tl.load(lens_ptr + row)
    i_k = tile_k * BLOCK_D + tl.arange(0, BLOCK_D)
    i_v = tile_v * BLOCK_D + tl.arange(0, BLOCK_D)
    in_k, in_v = i_k < D, i_v < D
    tile = i_k[:, None] * D + i_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    owns_n = in_k & (tile_v == 0)
    i_l = tl.arange(0, BLOCK_L)

    dc = tl.load(grad_last_c_ptr + row * D * D + tile, mask=in_tile, other=0.0)
    dn = tl.load(grad_last_n_ptr + row * D + i_k, mask=in_k, other=0.0)
    c = tl.load(last_c_ptr + row * D * D + tile, mask=in_tile, other=0.0)
    n = tl.load(last_n_ptr + row * D + i_k, mask=owns_n, other=0.0)
    used = tl.cdiv(length, L)
    at = row * (num_chunks + 1) + used
    tl.store(
        overlap_ptr + at * num_tiles * num_tiles + own, tl.sum(dc * c) + tl.sum(dn * n)
    )

    # The interpreter cannot iterate over a range whose end was loaded.
    chunk = used
    while chunk > 0:
        chunk -= 1
        at = row * num_chunks + chunk
        stored = dc.to(grad_c_ptr.dtype.element_ty)
        tl.store(grad_c_ptr + at * D * D + tile, stored, mask=in_tile)
        tl.store(grad_n_ptr + at * D + i_k, dn, mask=owns_n)

        t = chunk * L + i_l
        valid = (i_l < L) & (t < length)
        pos = (row * seq_len + t) * D
        q = tl.load(
            q_ptr + pos[None, :] + i_k[:, None],
            mask=in_k[:, None] & valid[None, :],
            other=0.0,
        )
        dh = tl.load(
            grad_h_ptr + pos[:, None] + i_v[None, :],
            mask=valid[:, None] & in_v[None, :],
            other=0.0,
        )
        kept = tl.load(kept_ptr + at * L + i_l, mask=valid, other=0.0)
        inverse = tl.load(inverse_ptr + at * L + i_l, mask=valid, other=0.0)
        dden = tl.load(grad_denominator_ptr + at * L + i_l, mask=valid, other=0.0)
        decay = tl.load(decay_ptr + at)
        weighed = q.to(tl.float32) * kept[None, :]
        dnum = (dh.to(tl.float32) * inverse[:, None]).to(dh.dtype)
        dc = decay * dc + product(weighed.to(dh.dtype), dnum, WIDE)
        dn = decay * dn + tl.sum(weighed * dden[None, :], 1)

        before = tl.load(c_ptr + at * D * D + tile, mask=in_tile, other=0.0)
        n = tl.load(n_ptr + at * D + i_k, mask=owns_n, other=0.0)
        overlap = tl.sum(dc * before.to(tl.float32)) + tl.sum(dn * n)
        at = row * (num_chunks + 1) + chunk
        tl.store(overlap_ptr + at * num_tiles * num_tiles + own, overlap)

    tl.store(grad_c0_ptr + row * D * D + tile, dc, mask=in_tile)
    tl.store(grad_n0_ptr + row * D + i_k, dn, mask=owns_n)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def query_key_grad_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    q_ptr,
    k_ptr,
    v_ptr,
    grad_h_ptr,
    a_ptr,
    peak_ptr,
    kept_ptr,
    added_ptr,
    inverse_ptr,
    grad_denominator_ptr,
    lens_ptr,
    c_ptr,
    n_ptr,
    grad_c_ptr,
    grad_n_ptr,
    grad_q_ptr,
    grad_k_ptr,
    q_overlap_ptr,
    k_overlap_ptr,
    seq_len,
    num_chunks,
    scale,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute a tile of dq and dk of a chunk, and its share of q dq and k dk."""
    num_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, row = place(num_chunks * num_tiles)
    chunk, own_tile = own // num_tiles, own % num_tiles
    length = tl.load(lens_ptr + row)
    if chunk * L >= length:
        return

    i_k = own_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_k = i_k < D
    i_l = tl.arange(0, BLOCK_L)
    t = chunk * L + i_l
    valid = (i_l < L) & (t < length)
    pos = (row * seq_len + t) * D
    at = row * num_chunks + chunk
    pairs = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    dq = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    dk = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    small = at * L + i_l
    inverse = tl.load(inverse_ptr + small, mask=valid, other=0.0)

    for start in range(0, D, BLOCK_D):
        i_v = start + tl.arange(0, BLOCK_D)
        in_v = i_v < D
        in_h = valid[:, None] & in_v[None, :]
        dh = tl.load(grad_h_ptr + pos[:, None] + i_v[None, :], mask=in_h, other=0.0)
        v = tl.load(v_ptr + pos[:, None] + i_v[None, :], mask=in_h, other=0.0)
        # (Dv,Dk): transposed as it is read
        tile = at * D * D + i_k[None, :] * D + i_v[:, None]
        in_tile = in_k[None, :] & in_v[:, None]
        c = tl.load(c_ptr + tile, mask=in_tile, other=0.0)
        dc = tl.load(grad_c_ptr + tile, mask=in_tile, other=0.0)
        dnum = (dh.to(tl.float32) * inverse[:, None]).to(dh.dtype)
        pairs += product(dnum, tl.trans(v), WIDE)
        dq += product(dnum, c, WIDE)
        dk += product(v, dc, WIDE)

    a = tl.load(a_ptr + small, mask=valid, other=0.0)
    peak = tl.load(peak_ptr + small, mask=valid, other=0.0)
    kept = tl.load(kept_ptr + small, mask=valid, other=0.0)
    added = tl.load(added_ptr + small, mask=valid, other=0.0)
    dden = tl.load(grad_denominator_ptr + small, mask=valid, other=0.0)
    n = tl.load(n_ptr + at * D + i_k, mask=in_k, other=0.0)
    dn = tl.load(grad_n_ptr + at * D + i_k, mask=in_k, other=0.0)
    past = (i_l[:, None] >= i_l[None, :]) & valid[:, None] & valid[None, :]
    exponent = tl.where(past, a[None, :] - peak[:, None], float("-inf"))
    dpairs = tl.exp(exponent) * (pairs + dden[:, None]) * scale

    own = pos[:, None] + i_k[None, :]
    in_q = valid[:, None] & in_k[None, :]
    q = tl.load(q_ptr + own, mask=in_q, other=0.0)
    k = tl.load(k_ptr + own, mask=in_q, other=0.0)
    dpairs = dpairs.to(q.dtype)
    dq = kept[:, None] * (dq + dden[:, None] * n[None, :])
    dq += product(dpairs, k, WIDE)
    dk = added[:, None] * (dk + dn[None, :])
    dk += product(tl.trans(dpairs), q, WIDE)

    tl.store(grad_q_ptr + own, dq.to(grad_q_ptr.dtype.element_ty), mask=in_q)
    tl.store(grad_k_ptr + own, dk.to(grad_k_ptr.dtype.element_ty), mask=in_q)
    share = small * num_tiles + own_tile
    tl.store(q_overlap_ptr + share, tl.sum(q.to(tl.float32) * dq, 1), mask=valid)
    tl.store(k_overlap_ptr + share, tl.sum(k.to(tl.float32) * dk, 1), mask=valid)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def value_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    q_ptr,
    k_ptr,
    grad_h_ptr,
    a_ptr,
    peak_ptr,
    added_ptr,
    inverse_ptr,
    lens_ptr,
    grad_c_ptr,
    grad_v_ptr,
    seq_len,
    num_chunks,
    scale,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute a tile of dv of a chunk."""
    num_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, row = place(num_chunks * num_tiles)
    chunk, own_tile = own // num_tiles, own % num_tiles
    length = tl.load(lens_ptr + row)
    if chunk * L >= length:
        return

    i_v = own_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_v = i_v < D
    i_l = tl.arange(0, BLOCK_L)
    t = chunk * L + i_l
    valid = (i_l < L) & (t < length)
    pos = (row * seq_len + t) * D
    at = row * num_chunks + chunk
    pairs = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    dv = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)

    for start in range(0, D, BLOCK_D):
        i_k = start + tl.arange(0, BLOCK_D)
        in_k = i_k < D
        in_q = valid[:, None] & in_k[None, :]
        q = tl.load(q_ptr + pos[:, None] + i_k[None, :], mask=in_q, other=0.0)
        k = tl.load(k_ptr + pos[:, None] + i_k[None, :], mask=in_q, other=0.0)
        dc = tl.load(
            grad_c_ptr + at * D * D + i_k[:, None] * D + i_v[None, :],
            mask=in_k[:, None] & in_v[None, :],
            other=0.0,
        )
        pairs += product(q, tl.trans(k), WIDE)
        dv += product(k, dc, WIDE)

    small = at * L + i_l
    a = tl.load(a_ptr + small, mask=valid, other=0.0)
    peak = tl.load(peak_ptr + small, mask=valid, other=0.0)
    added = tl.load(added_ptr + small, mask=valid, other=0.0)
    inverse = tl.load(inverse_ptr + small, mask=valid, other=0.0)
    past = (i_l[:, None] >= i_l[None, :]) & valid[:, None] & valid[None, :]
    exponent = tl.where(past, a[None, :] - peak[:, None], float("-inf"))
    weights = tl.exp(exponent) * pairs * scale

    own = pos[:, None] + i_v[None, :]
    in_h = valid[:, None] & in_v[None, :]
    dh = tl.load(grad_h_ptr + own, mask=in_h, other=0.0)
    dnum = (dh.to(tl.float32) * inverse[:, None]).to(dh.dtype)
    dv = added[:, None] * dv
    dv += product(tl.trans(weights.to(dh.dtype)), dnum, WIDE)
    tl.store(grad_v_ptr + own, dv.to(grad_v_ptr.dtype.element_ty), mask=in_h)
