"""What the kernels of the mLSTM on ragged rows share: blocks of positions as tiles.

Imports triton, so it is imported by who runs it only. A block of positions is a tuple
of tiles, each ``BLOCK_D`` wide, as D need be no power of two.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.tile_products import multiply


@triton.jit
def place(begins, num_blocks, num_rows):  # type: ignore[no-untyped-def]  # Triton has no annotations
    """Tell a program its block, its segment's first row and length, and its head.

    The head comes first as a number, then as where its row of ``(H,C)`` has the
    segment.
    """
    program = tl.program_id(0)
    segment = program // num_blocks
    begin = tl.load(begins + segment)
    length = tl.load(begins + segment + 1) - begin
    begin = begin.to(tl.int64)
    head = tl.program_id(1)
    # A head's queries, and keys, of late positions follow those of early ones.
    return program % num_blocks, begin, length, head, head * num_rows + begin


@triton.jit  # type: ignore[untyped-decorator]  # as above
def load_tiles(  # type: ignore[no-untyped-def]  # as above
    at, stride, steps, valid, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load a block of positions, as a tuple of tiles."""
    tiles = ()
    for start in tl.static_range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = valid[:, None]
        if start + BLOCK_D > D:
            mask = mask & (cols < D)[None, :]
        tiles = tiles + (  # type: ignore[assignment]  # noqa: RUF005  # Triton has no starred tuples
            tl.load(at + steps[:, None] * stride + cols[None, :], mask=mask, other=0.0),
        )
    return tiles


@triton.jit  # type: ignore[untyped-decorator]  # as above
def store_tiles(  # type: ignore[no-untyped-def]  # as above
    at, stride, steps, valid, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store a block of positions, given as a tuple of tiles."""
    for start in tl.static_range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = valid[:, None]
        if start + BLOCK_D > D:
            mask = mask & (cols < D)[None, :]
        tl.store(
            at + steps[:, None] * stride + cols[None, :],
            tiles[start // BLOCK_D].to(at.dtype.element_ty),
            mask=mask,
        )


@triton.jit  # type: ignore[untyped-decorator]  # as above
def zero_tiles(  # type: ignore[no-untyped-def]  # as above
    NUM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Make a tuple of tiles to add to."""
    tiles = ()
    for _ in tl.static_range(NUM):
        tiles = tiles + (tl.zeros((BLOCK, BLOCK_D), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005  # as above
    return tiles


@triton.jit  # type: ignore[untyped-decorator]  # as above
def multiply_all(  # type: ignore[no-untyped-def]  # as above
    xs,
    ys,
    NUM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply each of the positions of one block with each of another."""
    total = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for i in tl.static_range(NUM):
        total = multiply(xs[i], tl.trans(ys[i]), INTERPRETED, PRECISION, total)
    return total


@triton.jit  # type: ignore[untyped-decorator]  # as above
def add_weighted(  # type: ignore[no-untyped-def]  # as above
    totals,
    weights,
    xs,
    NUM: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the weighted sums of a block's positions to ``totals``."""
    weights = weights.to(xs[0].dtype)
    new = ()
    for i in tl.static_range(NUM):
        new = new + (multiply(weights, xs[i], INTERPRETED, PRECISION, totals[i]),)  # type: ignore[assignment]  # noqa: RUF005  # as above
    return new


@triton.jit
def decays(a, peak, s, t, length):  # type: ignore[no-untyped-def]  # as above
    """Weigh keys ``s`` at queries ``t``; each argument has the axis of its side."""
    # Masked before exp, which could overflow for keys that are in the future.
    return tl.exp(tl.where((s <= t) & (t < length), a - peak, float("-inf")))
