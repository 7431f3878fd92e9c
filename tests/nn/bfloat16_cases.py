"""What tests of functions in C++ share that keep numbers in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

from moxe_plugin.nn.products import rounds_to_bfloat16

needs_bfloat16 = pytest.mark.skipif(
    not rounds_to_bfloat16(), reason="C++ does not multiply bfloat16 here"
)

in_each_dtype = pytest.mark.parametrize(
    "dtype",
    [float32, float64, pytest.param(bfloat16, marks=needs_bfloat16, id="bfloat16")],
    ids=str,
)
"""Runs a test for each type that functions in C++ keep numbers in, as ``dtype``."""


def differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return a function's result and its gradients, of the same numbers in any dtype.

    :param function: What to call.
    :param inputs: Its arguments, of bfloat16.
    :param dtype: What to convert them to.

    :returns: The result, and the gradient of each argument.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    result = function(*leaves)

    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(result.shape, generator=generator).bfloat16().to(dtype)

    return [result, *torch.autograd.grad(result, leaves, upstream)]


def assert_rounded_once(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that numbers are those of float32 arithmetic, rounded to bfloat16.

    :param actual: What C++ wrote.
    :param expected: The same, computed in float64 of the same inputs.
    """
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == bfloat16
        assert y.dtype == float64

        # Where terms cancel, float32 leaves an error of the size of the terms.
        largest = y.abs().max().item() if y.numel() > 0 else 0.0
        assert_close(x.double(), y, rtol=2**-8, atol=1e-5 * largest)
