"""The kernels of :mod:`moxe_plugin.nn.triton.slstm_rows`: R stays on chip.

A program takes one head of one expert and some of its segments through all steps. R, at
Table 1 size 160 * 640 * 2 bytes = 205 kB in bfloat16, fits into the 227 kB of shared
memory that a program may have on an H100: it is the left factor of each product, loaded
before the loop, and the outputs of the step before are the right one. So a product is
``(gates, D) (D, segments)``: what stands in rows elsewhere stands in columns here.

Tiles are powers of two, and D = 160 is 128 + 32: P channels, the *body*, and Q more,
the *tail* (Q = 0 if D is a power of two). Nothing is padded, or R would not fit.

Backward, dy is the sum over gates of ``R_g dg``. Its Q channels of the tail would be
less than the 64 rows that the tensor cores take. Gates come in pairs instead: columns
of the right factor are ``(segment, half)``, half 0 being i or f and half 1 being z or
o; rows are ``(half, channel)``, and what has two different halves is not used. As a
product is bound by reading R, twice the columns cost nothing.

A tensor that goes from the threads that have it to others goes through shared memory,
with barriers. So rows are ordered such that the gates of a channel, or both halves, are
with one thread where the tensor cores leave them; loads and stores are those of
:mod:`.tile_access`; and of a tail there are always 8 columns, as two groups of warps
then have 4 each: of 4 segments, the same. What is left in a step is one barrier before
and one after the outputs, or gradients, go to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.tile_access import load_here, store_here


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def columns(x, y, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, element: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Let the columns of two tiles take turns: two of (SIZE,N) -> (SIZE,N*2).

    Of 4 segments all columns come again: the tensor cores take 8, but Triton gives them
    no fewer than 16. Rounded last: else Triton 3.5 and 3.6 put what has three
    dimensions into shared memory, in a layout that they do not have.
    """
    both = tl.reshape(tl.join(x, y), (SIZE, 2 * BLOCK_N))
    if BLOCK_N == 4:
        both = tl.reshape(tl.permute(tl.join(both, both), (0, 2, 1)), (SIZE, 16))
    return both.to(element)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def first_copy(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Leave out what :func:`columns` made of 4 segments a second time."""
    if BLOCK_N == 4:
        x, _ = tl.split(tl.permute(tl.reshape(x, (SIZE, 2, 2 * BLOCK_N)), (0, 2, 1)))
    return x


@triton.jit  # type: ignore[untyped-decorator]  # as above
def find_segments(  # type: ignore[no-untyped-def]  # as above
    bounds, expert, N, STEP: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr
):
    """Tell the first row, int64, and the length of the segment of each column."""
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, COLUMNS) % BLOCK_N
    is_segment = segments < N
    at = bounds + (expert * N + segments) * STEP
    first = tl.load(at, mask=is_segment, other=0)
    last = tl.load(at + 1, mask=is_segment, other=0)
    return first.to(tl.int64), last - first


@triton.jit  # type: ignore[untyped-decorator]  # as above
def find_states(  # type: ignore[no-untyped-def]  # as above
    expert, head, H, N, D: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr
):
    """Tell where each column's memory begins in (E,N,H,D), and whether it has one."""
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, COLUMNS) % BLOCK_N
    at = ((expert * N + segments).to(tl.int64) * H + head) * D
    return at[None, :], (segments < N)[None, :]


@triton.jit  # type: ignore[untyped-decorator]  # as above
def load_states(  # type: ignore[no-untyped-def]  # as above
    c,
    log_n,
    y,
    at,
    is_state,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMPTY: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Load a memory, or its gradient; without, all is 0 but ``log_n``, ``EMPTY``."""
    if HAS_MEMORY:
        c = load_here(c + at, is_state, INTERPRETED)
        log_n = load_here(log_n + at, is_state, INTERPRETED)
        y = load_here(y + at, is_state, INTERPRETED)
    else:
        c = tl.zeros((SIZE, COLUMNS), tl.float32)
        log_n = tl.full((SIZE, COLUMNS), EMPTY, tl.float32)
        y = tl.zeros((SIZE, COLUMNS), tl.float32)
    return c, log_n, y


@triton.jit  # type: ignore[untyped-decorator]  # as above
def store_states(  # type: ignore[no-untyped-def]  # as above
    into_c,
    into_log_n,
    into_y,
    at,
    c,
    log_n,
    y,
    is_state,
    HAS_MEMORY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store a memory, or its gradient."""
    if HAS_MEMORY:
        store_here(into_c + at, c, is_state, INTERPRETED)
        store_here(into_log_n + at, log_n, is_state, INTERPRETED)
        store_here(into_y + at, y, is_state, INTERPRETED)
