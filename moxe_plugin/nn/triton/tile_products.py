"""Products of tiles, in kernels, and the constants that they want of a launch.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def multiply(  # type: ignore[no-untyped-def]  # as above
    x, y, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr = None, total=None
):
    """Multiply tiles, ``(A,B) (B,C)``; sums are float32, and ``total`` is added.

    ``PRECISION`` is that of float32 tiles: others need none. Triton's interpreter
    multiplies the bits of bfloat16 as if they were integers; products of bfloat16 are
    exact in float32, so widening changes nothing else.
    """
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)

    return tl.dot(x, y, total, input_precision=PRECISION)


def is_interpreted() -> bool:
    """Tell the constant ``INTERPRETED``.

    :returns: Whether Triton interprets kernels, as ``TRITON_INTERPRET`` asks for.
    """
    return bool(triton.knobs.runtime.interpret)


def find_precision(dtype: torch.dtype) -> str:
    """Tell the constant ``PRECISION``.

    :param dtype: The type of the tiles.

    :returns: "ieee" for float32 that torch's own products keep, else "tf32"
        (TensorFloat-32), which is none to tiles of other types.
    """
    highest = torch.get_float32_matmul_precision() == "highest"

    return "ieee" if dtype == torch.float32 and highest else "tf32"
