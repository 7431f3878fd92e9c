"""Tests of `moxe_plugin.nn.native.gating`, against the same in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.autograd import grad
from torch.nn.functional import layer_norm, silu
from torch.testing import assert_close

from moxe_plugin.nn import passes
from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.layers import NORM_EPS
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.native.gating import (
    MLSTMOutput,
    gate_mlstm_output,
    silu_product,
)
from moxe_plugin.nn.native.library import why_not_loaded
from tests.nn.bfloat16_cases import (
    assert_rounded_once,
    differentiate,
    needs_bfloat16,
)

needs_compiler = pytest.mark.skipif(
    why_not_loaded("gating") is not None,
    reason=f"no C++ here: {why_not_loaded('gating')}",
)

# Idle experts, and more rows than what the gradients sum at a time.
COUNTS = [
    pytest.param([3, 0, 70], id="idle"),
    pytest.param([0, 0, 0], id="no-row"),
    pytest.param([33, 32, 1], id="all"),
]


def make_inputs(
    counts: list[int], dim: int, dtype: torch.dtype
) -> tuple[MLSTMOutput, Tensor]:
    """Return the inputs, and the tensor whose second half is the gate."""
    rows, parameters = (sum(counts), dim), (len(counts), dim)
    # In the block, too, it is half of what a projection gives.
    joint = torch.randn(sum(counts), 2 * dim, dtype=dtype, requires_grad=True)

    hidden, weight, convolved, skip = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in (rows, parameters, rows, parameters)
    )

    return MLSTMOutput(hidden, weight, convolved, skip, joint[:, dim:]), joint


def gate_in_torch(inputs: MLSTMOutput, counts: list[int], num_heads: int) -> Tensor:
    hidden, weight, convolved, skip, gate = inputs
    heads = hidden.unflatten(1, (num_heads, -1))
    normed = layer_norm(heads, heads.shape[-1:], eps=NORM_EPS).flatten(1)
    weight, skip = (
        x.repeat_interleave(torch.tensor(counts), dim=0) for x in (weight, skip)
    )

    return (normed * weight + skip * convolved) * silu(gate)


@needs_compiler
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("head_dim", [3, 16, 40])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("counts", COUNTS)
def test_outputs_and_gradients_are_those_of_torch(
    counts: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs, joint = make_inputs(counts, num_heads * head_dim, dtype)
    leaves = [*inputs[:-1], joint]

    expected = gate_in_torch(inputs, counts, num_heads)
    actual = gate_mlstm_output(inputs, counts, num_heads, NORM_EPS)

    upstream = torch.randn_like(expected)
    tol = 1e-10 if dtype == float64 else 2e-5
    assert_close(actual, expected, rtol=tol, atol=tol)
    assert_close(
        grad(actual, leaves, upstream),
        grad(expected, leaves, upstream),
        rtol=tol,
        atol=tol,
    )


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("head_dim", [3, 16, 40])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("counts", COUNTS)
def test_outputs_and_gradients_of_bfloat16_are_rounded_once(
    counts: list[int], num_heads: int, head_dim: int
) -> None:
    dim = num_heads * head_dim
    inputs, joint = make_inputs(counts, dim, bfloat16)
    leaves = [*inputs[:-1], joint]

    def split_gate(tensors: Sequence[Tensor]) -> MLSTMOutput:
        hidden, weight, convolved, skip, joint = tensors

        return MLSTMOutput(hidden, weight, convolved, skip, joint[:, dim:])

    def in_cpp(*tensors: Tensor) -> Tensor:
        return gate_mlstm_output(split_gate(tensors), counts, num_heads, NORM_EPS)

    def in_torch(*tensors: Tensor) -> Tensor:
        return gate_in_torch(split_gate(tensors), counts, num_heads)

    assert_rounded_once(
        differentiate(in_cpp, leaves, bfloat16),
        differentiate(in_torch, leaves, float64),
    )


@needs_compiler
@pytest.mark.usefixtures("_restored_threads")
def test_threads_change_no_bit() -> None:
    counts = [100, 0, 37]
    inputs, joint = make_inputs(counts, 24, float32)
    upstream = torch.randn(137, 24)

    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        out = gate_mlstm_output(inputs, counts, 3, NORM_EPS)
        results.append([out, *grad(out, [*inputs[:-1], joint], upstream)])

    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@needs_compiler
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (5, 66), (2, 3, 4, 32)], ids=str)
def test_products_with_silu_are_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    joint = torch.randn(shape, dtype=dtype, requires_grad=True)
    gate, value = joint.chunk(2, dim=-1)

    expected, actual = silu(gate) * value, silu_product(joint)

    upstream = torch.randn_like(expected)
    tol = 1e-12 if dtype == float64 else 1e-6
    assert_close(actual, expected, rtol=tol, atol=tol)
    assert_close(
        grad(actual, joint, upstream),
        grad(expected, joint, upstream),
        rtol=tol,
        atol=tol,
    )


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (5, 66), (2, 3, 4, 32)], ids=str)
def test_products_of_bfloat16_with_silu_are_rounded_once(
    shape: tuple[int, ...],
) -> None:
    joint = torch.randn(shape).bfloat16()

    def in_torch(joint: Tensor) -> Tensor:
        gate, value = joint.chunk(2, dim=-1)

        return silu(gate) * value

    assert_rounded_once(
        differentiate(silu_product, [joint], bfloat16),
        differentiate(in_torch, [joint], float64),
    )


@needs_compiler
def test_silu_is_exact_to_a_few_ulps_everywhere() -> None:
    gates = torch.cat(
        [
            torch.linspace(-120, 120, 20_001),
            torch.linspace(-1, 1, 20_001),
            torch.logspace(-30, 2, 999),
        ]
    ).requires_grad_()
    wide = gates.detach().double().requires_grad_()
    ones = torch.ones_like(gates)

    # Each number is a row: of [gate, 1].
    actual = silu_product(torch.stack([gates, ones], dim=1)).squeeze(1)
    expected = silu(wide)

    eps = torch.finfo(float32).eps
    # Below, float32 has fewer digits.
    smallest = torch.finfo(float32).tiny
    assert_close(actual.double(), expected, rtol=3 * eps, atol=smallest)
    assert_close(
        grad(actual, gates, ones)[0].double(),
        grad(expected, wide, ones.double())[0],
        # Where it changes its sign, the terms are larger than their sum.
        rtol=3 * eps,
        atol=eps / 2,
    )


@needs_compiler
def test_what_is_no_number_stays_so() -> None:
    numbers = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0, -0.0])
    joint = torch.stack([numbers, torch.ones(6)], dim=1)

    actual = silu_product(joint).squeeze(1)

    assert_close(actual, silu(numbers), equal_nan=True)


def list_nodes(node: object) -> set[str]:
    if node is None:
        return set()
    parts = [list_nodes(x) for x, _ in node.next_functions]  # type: ignore[attr-defined]  # of autograd
    return {type(node).__name__}.union(*parts)


def compare_with_and_without(
    run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_cpp = run()
    assert name in list_nodes(with_cpp.grad_fn)
    monkeypatch.setattr(passes, "why_not_loaded", lambda _: "no compiler")
    without = run()

    assert name not in list_nodes(without.grad_fn)
    assert_close(with_cpp, without, rtol=0, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("num_experts", [None, 3])
def test_feed_forward_is_the_same_with_and_without_cpp(
    num_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = GatedFeedForward(
        12, 20, up_std=0.3, down_std=0.3, num_experts=num_experts
    ).double()
    shape = (2, 5, 12) if num_experts is None else (num_experts, 2, 5, 12)
    seqs = torch.randn(shape, dtype=float64)

    compare_with_and_without(lambda: network(seqs), monkeypatch, "_SiluProductBackward")


@needs_compiler
@pytest.mark.parametrize("num_experts", [None, 3])
def test_block_is_the_same_with_and_without_cpp(
    num_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = MLSTMBlock(32, num_heads=2, num_experts=num_experts).double()
    torch.nn.init.normal_(block.skip)
    shape = (2, 5, 32) if num_experts is None else (num_experts, 2, 5, 32)
    seqs = torch.randn(shape, dtype=float64)

    compare_with_and_without(
        lambda: block(seqs, return_state=False)[0],
        monkeypatch,
        "_GateMLSTMOutputBackward",
    )


@needs_compiler
@needs_bfloat16
def test_blocks_of_bfloat16_run_in_cpp_too() -> None:
    block = MLSTMBlock(32, num_heads=2).bfloat16()
    network = GatedFeedForward(32, 20, up_std=0.3, down_std=0.3).bfloat16()
    seqs = torch.randn(2, 5, 32).bfloat16()

    hidden, _ = block(seqs)
    out = network(hidden)

    assert out.dtype == bfloat16
    names = {"_GateMLSTMOutputBackward", "_SiluProductBackward"}
    assert names <= list_nodes(out.grad_fn)
