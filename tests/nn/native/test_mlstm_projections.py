"""Tests of `moxe_plugin.nn.native.mlstm_projections`, against torch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64, nan
from torch.autograd import grad

from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.mlstm_forms import CellGradients
from moxe_plugin.nn.native.mlstm_projections import fits
from moxe_plugin.nn.products import why_torch
from tests.nn.bfloat16_cases import needs_bfloat16
from tests.nn.native.projection_calls import (
    MLSTMProjections,
    ProjectedRows,
    ProjectionInputs,
    project_rows,
    project_rows_backward,
)

pytestmark = pytest.mark.skipif(
    why_torch() is not None or why_not_loaded("mlstm_projections") is not None,
    reason=f"no C++ here: {why_torch() or why_not_loaded('mlstm_projections')}",
)

# Around tiles of 14 rows, blocks of 56, and pairs.
COUNTS = [[1], [2, 0, 13], [14, 15, 0], [57, 56, 113]]


def make_inputs(num_rows: int, width: int) -> ProjectionInputs:
    # Rows of the first lie apart, as a half of what is projected up does.
    joint = torch.randn(num_rows, 2 * width + 3)

    return ProjectionInputs(joint[:, 3 : width + 3], torch.randn(num_rows, width))


def make_weights(num_experts: int, num_groups: int, num_heads: int) -> MLSTMProjections:
    width = 32 * num_groups
    q, k, v = torch.randn(3, num_experts, num_groups, 32, 32) / 6

    return MLSTMProjections(
        *(q, k, v),
        *torch.randn(2, num_experts, 3 * width, num_heads) / width**0.5,
        *torch.randn(2, num_experts, num_heads),
    )


def project_with_torch(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    conv_input, convolved = inputs
    expert_ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    of_rows = [x[expert_ids] for x in weights]
    of_channels, of_gates, bias = (
        of_rows[:3],
        torch.cat(of_rows[3:5], dim=-1),
        torch.cat(of_rows[5:], dim=-1),
    )

    q, k, v = (
        torch.einsum("rgi,rgio->rgo", x.unflatten(1, (-1, 32)), w).flatten(1)
        for x, w in zip((convolved, convolved, conv_input), of_channels, strict=True)
    )
    joint = torch.cat([q, k, v], dim=1)

    return [q, k, v, torch.einsum("ri,rio->ro", joint, of_gates) + bias]


def convert(
    inputs: ProjectionInputs, weights: MLSTMProjections, dtype: torch.dtype
) -> tuple[ProjectionInputs, MLSTMProjections]:
    return (
        ProjectionInputs(*(x.to(dtype) for x in inputs)),
        MLSTMProjections(*(x.to(dtype) for x in weights)),
    )


def check_all(
    counts: list[int],
    num_groups: int,
    num_heads: int,
    tolerance: float,
    dtype: torch.dtype = float32,
) -> None:
    torch.manual_seed(1)
    inputs, weights = convert(
        make_inputs(sum(counts), 32 * num_groups),
        make_weights(len(counts), num_groups, num_heads),
        dtype,
    )
    # Gates and their gradients are float32.
    dtypes = [dtype] * 3 + [float32]
    leaves = [x.to(float64).requires_grad_() for x in (*inputs, *weights)]
    expected = project_with_torch(leaves[:2], leaves[2:], counts)
    upstream = [
        torch.randn(x.shape).to(y) for x, y in zip(expected, dtypes, strict=True)
    ]
    expected_grads = [*grad(expected, leaves, [x.double() for x in upstream])]
    onto = torch.randn_like(inputs.convolved)
    expected_grads[1] = expected_grads[1] + onto

    projected = project_rows(inputs, weights, counts)
    rounded = ProjectedRows(*(x.to(y) for x, y in zip(expected, dtypes, strict=True)))
    grads = project_rows_backward(
        *(inputs, weights, rounded, CellGradients(*upstream), counts, [True] * 3),
        onto=onto,
    )
    assert [x.dtype for x in projected] == dtypes

    of_weights = [x for x in grads.weights if x is not None]
    actual_grads = [grads.conv_input, grads.convolved, *of_weights, *grads.of_gates]
    assert all(x.dtype == dtype for x in actual_grads)
    for x, y in [
        *zip(projected, expected, strict=True),
        *zip(actual_grads, expected_grads, strict=True),
    ]:
        assert x.shape == y.shape
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("num_heads", [1, 3, 4, 8])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_and_gradients_are_those_of_torch(
    counts: list[int], num_heads: int
) -> None:
    # Groups that do not fill the last task.
    check_all(counts, 6, num_heads, 2e-6)


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("num_heads", [1, 4, 8])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_autocast_rounds_factors(counts: list[int], num_heads: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        # 8 bits of each factor, and of what is multiplied again; gates cancel.
        check_all(counts, 6, num_heads, 2**-6)

        with pytest.raises(AssertionError):
            check_all(counts, 6, num_heads, 1e-5)


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("num_heads", [1, 4, 8])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_bfloat16_is_rounded_only_where_it_is_written(
    counts: list[int], num_heads: int
) -> None:
    # 8 bits of each result, and of gradients of queries, keys and values, of two parts.
    check_all(counts, 6, num_heads, 2**-7, bfloat16)


@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [
        pytest.param(float32, False, id="float32"),
        pytest.param(float32, True, id="autocast", marks=needs_bfloat16),
        pytest.param(bfloat16, False, id="bfloat16", marks=needs_bfloat16),
    ],
)
def test_experts_without_a_row_get_no_gradient(
    dtype: torch.dtype, rounds: bool
) -> None:
    counts = [0, 3, 0]
    inputs, weights = convert(make_inputs(3, 64), make_weights(3, 2, 2), dtype)
    context = torch.autocast("cpu", torch.bfloat16) if rounds else nullcontext()

    with context:
        projected = project_rows(inputs, weights, counts)
        of_cell = CellGradients(*(torch.randn_like(x) for x in projected))
        grads = project_rows_backward(
            *(inputs, weights, projected, of_cell, counts, [True, False, True]),
            onto=torch.zeros_like(inputs.convolved),
        )

    assert grads.weights[1] is None
    for x in (grads.weights[0], grads.weights[2], *grads.of_gates):
        assert x is not None
        assert not x[[0, 2]].any()
        assert x[1].all()


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(float32, id="float32"),
        pytest.param(bfloat16, id="bfloat16", marks=needs_bfloat16),
    ],
)
@pytest.mark.usefixtures("_restored_threads")
def test_nothing_depends_on_the_number_of_threads(dtype: torch.dtype) -> None:
    counts = [120, 7]
    inputs, weights = convert(make_inputs(127, 192), make_weights(2, 6, 4), dtype)
    results = []

    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        projected = project_rows(inputs, weights, counts)
        of_cell = CellGradients(*projected)
        grads = project_rows_backward(
            *(inputs, weights, projected, of_cell, counts, [True] * 3),
            onto=torch.ones_like(inputs.convolved),
        )
        results.append([*projected, *grads[:2], *grads.weights, *grads.of_gates])

    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_rows_do_not_see_each_other() -> None:
    inputs, weights = make_inputs(30, 64), make_weights(1, 2, 2)
    expected = project_rows(inputs, weights, [30])
    inputs.convolved[7], inputs.conv_input[9] = nan, nan

    actual = project_rows(inputs, weights, [30])

    keeps = torch.ones(30, dtype=torch.bool)
    keeps[[7, 9]] = False
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x[keeps], y[keeps])
    assert actual.q[7].isnan().all()
    assert actual.v[9].isnan().all()
    assert actual.gates[[7, 9]].isnan().all()


def test_other_sizes_do_not_fit() -> None:
    assert fits(group_width=32, num_heads=8)
    assert not fits(group_width=32, num_heads=9)
    assert not fits(group_width=16, num_heads=2)
