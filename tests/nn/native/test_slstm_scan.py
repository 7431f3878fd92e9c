"""Tests of `moxe_plugin.nn.native.slstm_scan`: of what its functions are right to.

That it computes the cell is tested beside the cell.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.nn.functional import softplus
from torch.testing import assert_close

from moxe_plugin.nn import products
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.slstm_scan import RowBounds, RowScanInputs, slstm_scan
from tests.nn.bfloat16_cases import needs_bfloat16

pytestmark = pytest.mark.skipif(
    why_not_loaded("slstm_scan") is not None,
    reason=f"no C++ here: {why_not_loaded('slstm_scan')}",
)

EPS = torch.finfo(torch.float32).eps

# Of three experts, the last of which is idle.
LENS = torch.tensor([[3, 0, 5, 1, 2], [0, 4, 1, 9, 6], [0, 0, 0, 0, 0]])

NUMBERS = torch.cat(
    [
        torch.linspace(-100, 100, 4001),
        torch.linspace(-1, 1, 4001),
        torch.logspace(-30, 1, 191),
        -torch.logspace(-30, 1, 191),
    ]
)


def step(i: Tensor, f: Tensor, z: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step of one head from log n = 0, and return its output and log n."""
    zeros = torch.zeros(1, 1, 1, len(i), dtype=torch.promote_types(i.dtype, float32))
    memory = {"c": zeros, "log_n": zeros, "y": zeros}
    inputs = RowScanInputs(
        torch.cat([i, f]).unsqueeze(0),
        torch.cat([z, o]).unsqueeze(0),
        zeros.expand(1, 1, 4, len(i)),
        torch.zeros(1, 1, len(i), 4, len(i), dtype=i.dtype),
        **memory,
    )
    bounds = RowBounds([1], torch.zeros(1, 1).long(), torch.ones(1, 1).long(), 0)

    outputs, _, log_n, _ = slstm_scan(inputs, bounds)

    return outputs.flatten(), log_n.flatten()


@pytest.mark.parametrize("numbers", NUMBERS.split(1024))
def test_tanh_of_a_value_is_right_to_some_ulps(numbers: Tensor) -> None:
    # All that is new is taken in, and all of it goes out.
    open_gate = torch.full_like(numbers, 200.0)

    actual, _ = step(open_gate, -open_gate, numbers, open_gate)

    expected = numbers.double().tanh()
    assert_close(actual.double(), expected, rtol=3 * EPS, atol=0)


@pytest.mark.parametrize("numbers", NUMBERS.split(1024))
def test_sum_of_exponentials_is_right_to_some_ulps(numbers: Tensor) -> None:
    # log(exp(0) + exp(i)), as nothing is forgotten.
    open_gate = torch.full_like(numbers, 200.0)

    _, actual = step(numbers, open_gate, numbers, open_gate)

    # Where it is tiny, it is that of exp(i), right to some ulps as well.
    expected = softplus(numbers.double(), threshold=1000)
    tiny = torch.finfo(torch.float32).tiny
    assert_close(actual.double(), expected, rtol=4 * EPS, atol=tiny)


@pytest.mark.parametrize("numbers", NUMBERS.split(1024))
def test_share_of_the_new_is_right_to_some_ulps(numbers: Tensor) -> None:
    # w = sigmoid(i - log_kept), where log_kept is 0 and z is 1.
    open_gate = torch.full_like(numbers, 200.0)

    actual, _ = step(numbers, open_gate, open_gate, open_gate)

    tiny = torch.finfo(torch.float32).tiny
    expected = numbers.double().sigmoid()
    assert_close(actual.double(), expected, rtol=4 * EPS, atol=tiny)


def place_rows(padded_len: int) -> RowBounds:
    """Place rows of :data:`LENS`: without padding, or each of ``padded_len``."""
    strides = torch.full_like(LENS, padded_len) if padded_len > 0 else LENS
    begins = (strides.flatten().cumsum(0) - strides.flatten()).view_as(LENS)

    return RowBounds(strides.sum(dim=1).tolist(), begins, LENS, padded_len)


def differentiate_scan(
    head_dim: int, dtype: torch.dtype = float32, padded_len: int = 0
) -> list[Tensor]:
    """Return what a scan returns, and the gradients of all that it reads."""
    torch.manual_seed(1)
    bounds = place_rows(padded_len)
    wide = torch.promote_types(dtype, float32)

    # What is rounded before is not rounded again.
    def draw(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (scale * torch.randn(shape)).bfloat16().to(dtype)

    inputs = [
        *draw(2, sum(bounds.counts), 6 * head_dim, scale=1, dtype=dtype),
        draw(3, 3, 4, head_dim, scale=1, dtype=wide),
        draw(3, 3, head_dim, 4, head_dim, scale=head_dim**-0.5, dtype=dtype),
        *draw(3, 3, 5, 3, head_dim, scale=1, dtype=wide),
    ]

    leaves = [x.requires_grad_() for x in inputs]
    outputs = slstm_scan(RowScanInputs(*leaves), bounds)
    # float16 would not hold all of these.
    upstream = [draw(*x.shape, scale=1e5, dtype=x.dtype) for x in outputs]

    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("padded_len", [0, 11], ids=["rows", "padded"])
@pytest.mark.parametrize("head_dim", [1, 2, 21, 32, 35])
def test_rows_of_bfloat16_are_near_those_of_float64(
    head_dim: int, padded_len: int
) -> None:
    expected = differentiate_scan(head_dim, float64, padded_len)
    actual = differentiate_scan(head_dim, bfloat16, padded_len)

    # Outputs, c, log n, y; gradients of gates, bias, R, c, log n, y
    kinds = [bfloat16, *3 * [float32], *2 * [bfloat16], float32, bfloat16]
    assert [x.dtype for x in actual] == [*kinds, *3 * [float32]]

    # Each number is rounded to 8 bits once, and depends on others that were.
    for x, y in zip(actual, expected, strict=True):
        assert_close(x.double(), y, rtol=0, atol=2**-6 * y.abs().max().item())
        assert (x - y).norm() <= 2**-7 * y.norm()


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
def test_gradient_of_bfloat16_keeps_its_digits_where_little_is_kept() -> None:
    numbers = torch.linspace(-20, 20, 401).bfloat16()

    # y = w = sigmoid(i), as in `test_share_of_the_new_is_right_to_some_ulps`.
    def differentiate(dtype: torch.dtype) -> Tensor:
        i = numbers.to(dtype).requires_grad_()
        open_gate = torch.full_like(i, 200.0)
        y, _ = step(i, open_gate, open_gate, open_gate)

        return torch.autograd.grad(y.sum(), i)[0]

    # w, 1 - w and the gradient are rounded to 8 bits.
    assert_close(
        differentiate(bfloat16).double(), differentiate(float64), rtol=2**-7, atol=0
    )


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
def test_rows_of_bfloat16_are_those_under_autocast_rounded() -> None:
    with torch.autocast("cpu", bfloat16):
        expected = differentiate_scan(21)
    actual = differentiate_scan(21, bfloat16)

    # R and y are rounded by both, so that forwards the arithmetic is the same.
    for x, y in zip(actual[:4], expected[:4], strict=True):
        assert torch.equal(x, y.to(x.dtype))


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("head_dim", [1, 2, 21, 32, 35])
def test_autocast_rounds_factors_of_recurrent_products(head_dim: int) -> None:
    expected = differentiate_scan(head_dim)
    with torch.autocast("cpu", torch.bfloat16):
        actual = differentiate_scan(head_dim)

    # y and the gradients of gates are rounded to 8 bits before each product.
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 2**-7 * y.norm()
    assert not torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_that_cpp_does_not_follow_changes_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:
        monkeypatch.setattr(products, "why_torch", lambda: "it rains")
        monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: False)

    expected = differentiate_scan(32)
    with torch.autocast("cpu", dtype):
        actual = differentiate_scan(32)

    # Under autocast torch's product may sum in another order.
    assert_close(actual, expected, rtol=1e-5, atol=1.0)
