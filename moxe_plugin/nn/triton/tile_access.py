"""Loads and stores of tiles by the threads that have them, in kernels.

Triton gives loads and stores a layout of their own, in which neighbours in memory are
neighbours among threads, and brings tiles there through shared memory, with barriers.
Where waiting costs more than memory, as in a scan of few rows a step, these leave tiles
where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def load_here(pointers, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Load elements of 2 or 4 bytes as float32, 0 where ``mask`` does not hold.

    The compiler may move the load: nothing may write there while the kernel runs.
    """
    element: tl.constexpr = pointers.dtype.element_ty
    IS_HALF: tl.constexpr = element.primitive_bitwidth == 16
    if INTERPRETED:
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $2, 0; mov.b32 $0, 0; @%p ld.global."
            + ("u16" if IS_HALF else "b32")
            + " $0, [$1]; }",
            "=r,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        if IS_HALF:
            bits = bits.to(tl.int16)
        x = bits.to(element, bitcast=True).to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]  # as above
def store_here(pointers, x, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Store float32 as elements of 2 or 4 bytes where ``mask`` holds."""
    element: tl.constexpr = pointers.dtype.element_ty
    IS_HALF: tl.constexpr = element.primitive_bitwidth == 16
    x = x.to(element)
    if INTERPRETED:
        tl.store(pointers, x, mask=mask)
    else:
        if IS_HALF:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        else:
            bits = x.to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $3, 0; @%p st.global."
            + ("b16" if IS_HALF else "b32")
            + " [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [pointers.to(tl.int64), bits, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]  # as above
def load_four_here(pointers, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Load four float32 from each address, a multiple of 16 bytes; see `load_here`."""
    if INTERPRETED:
        a = tl.load(pointers, mask=mask, other=0.0)
        b = tl.load(pointers + 1, mask=mask, other=0.0)
        c = tl.load(pointers + 2, mask=mask, other=0.0)
        d = tl.load(pointers + 3, mask=mask, other=0.0)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0;"
            " mov.b32 $2, 0; mov.b32 $3, 0;"
            " @%p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=f,=f,=f,=f,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d


@triton.jit  # type: ignore[untyped-decorator]  # as above
def store_four_here(pointers, a, b, c, d, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Store four float32 to each address, a multiple of 16 bytes; see `store_here`."""
    if INTERPRETED:
        tl.store(pointers, a, mask=mask)
        tl.store(pointers + 1, b, mask=mask)
        tl.store(pointers + 2, c, mask=mask)
        tl.store(pointers + 3, d, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $6, 0;"
            " @%p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,l,f,f,f,f,r",
            [pointers.to(tl.int64), a, b, c, d, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]  # as above
def fetch_ahead(pointers, mask, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Let the second-level cache have the lines of 128 bytes that pointers point to."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $2, 0;"
            " @%p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
