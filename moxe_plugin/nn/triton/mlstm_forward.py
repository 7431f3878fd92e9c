"""The forward kernels of the chunkwise mLSTM: states between chunks, then outputs.

Imports triton, so it is imported by who runs it only. Rows are flat: B stands for all
leading dimensions, ``num_chunks`` for the chunks of the longest row, ``gates`` of shape
``(B,num_chunks*L)`` are float32. ``a``, ``peak``, ``kept`` and ``added`` are explained
in :mod:`moxe_plugin.nn.triton.mlstm`.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def product(x, y, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Multiply two tiles with float32 sums; ``WIDE`` where bfloat16 is interpreted.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers;
    products of bfloat16 are exact in float32, so widening changes nothing else.
    """
    if WIDE:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


@triton.jit
def place(num_per_row):  # type: ignore[no-untyped-def]  # as above
    """Tell which of a row's programs this is, and the row."""
    program = tl.program_id(0)
    return program % num_per_row, (program // num_per_row).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def state_kernel(  # type: ignore[no-untyped-def]  # as above
    k_ptr,
    v_ptr,
    added_ptr,
    decay_ptr,
    lens_ptr,
    c0_ptr,
    n0_ptr,
    c_ptr,
    n_ptr,
    last_c_ptr,
    last_n_ptr,
    seq_len,
    num_chunks,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
):
    """Run over the chunks of a row with one tile of C, and store it before each."""
    num_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, row = place(num_tiles * num_tiles)
    tile_k, tile_v = own // num_tiles, own % num_tiles
    length = tl.load(lens_ptr + row)
    i_k = tile_k * BLOCK_D + tl.arange(0, BLOCK_D)
    i_v = tile_v * BLOCK_D + tl.arange(0, BLOCK_D)
    in_k, in_v = i_k < D, i_v < D
    tile = i_k[:, None] * D + i_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    writes_n = in_k & (tile_v == 0)
    i_l = tl.arange(0, BLOCK_L)

    c = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    n = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_MEMORY:
        c += tl.load(c0_ptr + row * D * D + tile, mask=in_tile, other=0.0)
        n += tl.load(n0_ptr + row * D + i_k, mask=in_k, other=0.0)

    # The interpreter cannot iterate over a range whose end was loaded.
    chunk = 0
    while chunk * L < length:
        at = row * num_chunks + chunk
        tl.store(c_ptr + at * D * D + tile, c.to(c_ptr.dtype.element_ty), mask=in_tile)
        tl.store(n_ptr + at * D + i_k, n, mask=writes_n)

        t = chunk * L + i_l
        valid = (i_l < L) & (t < length)
        pos = (row * seq_len + t) * D
        k = tl.load(
            k_ptr + pos[None, :] + i_k[:, None],
            mask=in_k[:, None] & valid[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + pos[:, None] + i_v[None, :],
            mask=valid[:, None] & in_v[None, :],
            other=0.0,
        )
        added = tl.load(added_ptr + at * L + i_l, mask=valid, other=0.0)
        decay = tl.load(decay_ptr + at)
        weighed = k.to(tl.float32) * added[None, :]
        c = decay * c + product(weighed.to(v.dtype), v, WIDE)
        n = decay * n + tl.sum(weighed, 1)
        chunk += 1

    tl.store(last_c_ptr + row * D * D + tile, c, mask=in_tile)
    tl.store(last_n_ptr + row * D + i_k, n, mask=writes_n)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def output_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    peak_ptr,
    kept_ptr,
    floor_ptr,
    lens_ptr,
    c_ptr,
    n_ptr,
    h_ptr,
    denominator_ptr,
    seq_len,
    num_chunks,
    scale,
    eps,
    D: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute the outputs of a chunk, one tile of their width."""
    num_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    own, row = place(num_chunks * num_tiles)
    chunk, own_tile = own // num_tiles, own % num_tiles
    length = tl.load(lens_ptr + row)
    i_v = own_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_v = i_v < D
    i_l = tl.arange(0, BLOCK_L)
    t = chunk * L + i_l
    pos = (row * seq_len + t) * D
    out = h_ptr + pos[:, None] + i_v[None, :]
    written = ((i_l < L) & (t < seq_len))[:, None] & in_v[None, :]

    if chunk * L >= length:
        zeros = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        tl.store(out, zeros.to(h_ptr.dtype.element_ty), mask=written)
        return

    valid = (i_l < L) & (t < length)
    at = row * num_chunks + chunk
    pairs = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    numerator = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    denominator = tl.zeros((BLOCK_L,), tl.float32)

    for start in range(0, D, BLOCK_D):
        i_k = start + tl.arange(0, BLOCK_D)
        in_k = i_k < D
        in_q = valid[:, None] & in_k[None, :]
        q = tl.load(q_ptr + pos[:, None] + i_k[None, :], mask=in_q, other=0.0)
        k = tl.load(k_ptr + pos[:, None] + i_k[None, :], mask=in_q, other=0.0)
        c = tl.load(
            c_ptr + at * D * D + i_k[:, None] * D + i_v[None, :],
            mask=in_k[:, None] & in_v[None, :],
            other=0.0,
        )
        n = tl.load(n_ptr + at * D + i_k, mask=in_k, other=0.0)
        pairs += product(q, tl.trans(k), WIDE)
        numerator += product(q, c, WIDE)
        denominator += tl.sum(q.to(tl.float32) * n[None, :], 1)

    small = at * L + i_l
    a = tl.load(a_ptr + small, mask=valid, other=0.0)
    peak = tl.load(peak_ptr + small, mask=valid, other=0.0)
    kept = tl.load(kept_ptr + small, mask=valid, other=0.0)
    floor = tl.load(floor_ptr + small, mask=valid, other=1.0)
    past = (i_l[:, None] >= i_l[None, :]) & valid[:, None] & valid[None, :]
    exponent = tl.where(past, a[None, :] - peak[:, None], float("-inf"))
    weights = tl.exp(exponent) * pairs * scale

    v = tl.load(
        v_ptr + pos[:, None] + i_v[None, :],
        mask=valid[:, None] & in_v[None, :],
        other=0.0,
    )
    numerator = kept[:, None] * numerator
    numerator += product(weights.to(v.dtype), v, WIDE)
    denominator = kept * denominator + tl.sum(weights, 1)
    h = numerator / (tl.maximum(tl.abs(denominator), floor) + eps)[:, None]
    tl.store(out, h.to(h_ptr.dtype.element_ty), mask=written)
    writes_small = (i_l < L) & (own_tile == 0)
    tl.store(denominator_ptr + small, denominator, mask=writes_small)
