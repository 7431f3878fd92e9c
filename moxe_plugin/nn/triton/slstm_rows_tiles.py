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

What takes the time of a step is latency: waits for products, and tensors that go from
the threads that have them to those that store them, through shared memory. So products
are few and large, and where things are is computed from what does not change: a vector
of places that does would go from thread to thread at each step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # as above
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
