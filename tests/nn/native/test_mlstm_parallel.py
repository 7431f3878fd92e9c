"""Tests of `moxe_plugin.nn.native.mlstm_parallel`, against the reference in torch."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.mlstm_cell import MAX_EXPONENT, NORMALIZER_EPS, mlstm_parallel
from moxe_plugin.nn.native.causal_squares import Sequences
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.mlstm_forms import NormalizerLimits, run_form
from moxe_plugin.nn.native.mlstm_parallel import MLSTMParallelForm
from tests.nn.bfloat16_cases import needs_bfloat16

LIMITS = NormalizerLimits(MAX_EXPONENT, NORMALIZER_EPS)
NUM_HEADS = 2
NUM_PADDING = 3

pytestmark = pytest.mark.skipif(
    why_not_loaded("mlstm_parallel") is not None,
    reason=f"no C++ here: {why_not_loaded('mlstm_parallel')}",
)


def make_inputs(lens: list[int], dtype: torch.dtype, gate_scale: float) -> list[Tensor]:
    num_rows = sum(lens) + NUM_PADDING
    shapes = [(num_rows, NUM_HEADS, 7)] * 3 + [(num_rows, 2 * NUM_HEADS)]
    inputs = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    inputs[-1] *= gate_scale

    return [x.requires_grad_() for x in inputs]


def find_sequences(lens: list[int]) -> Sequences:
    return Sequences([0, *accumulate(lens)][:-1], lens)


def run(inputs: list[Tensor], seqs: Sequences) -> Tensor:
    q, k, v, gates = inputs

    return run_form(MLSTMParallelForm(seqs, NUM_HEADS, LIMITS), q, k, v, gates)


def run_one_by_one(lens: list[int], inputs: list[Tensor]) -> Tensor:
    q, k, v, gates = inputs
    outputs = []

    for begin, length in zip(*find_sequences(lens), strict=True):
        rows = slice(begin, begin + length)
        # (S,2H) -> two of (H,S)
        input_preact, forget_preact = gates[rows].t().chunk(2)
        output, _ = mlstm_parallel(
            q[rows].transpose(0, 1),
            k[rows].transpose(0, 1),
            v[rows].transpose(0, 1),
            input_preact,
            forget_preact,
            return_memory=False,
        )
        outputs.append(output.transpose(0, 1))

    return torch.cat([*outputs, q.new_zeros(NUM_PADDING, *q.shape[1:])])


LENS = [
    pytest.param([5], id="one"),
    pytest.param([1, 0, 70, 3], id="ragged"),
    pytest.param([130, 64, 65], id="several-blocks"),
]


@pytest.mark.parametrize(
    ("dtype", "gate_scale", "tolerance"),
    [
        (torch.float64, 1.0, 1e-11),
        (torch.float64, 30.0, 1e-11),
        (torch.float64, 300.0, 1e-11),
        (torch.float32, 1.0, 2e-4),
    ],
)
@pytest.mark.parametrize("lens", LENS)
def test_rows_are_sequences_by_themselves_with_all_gradients(
    lens: list[int], dtype: torch.dtype, gate_scale: float, tolerance: float
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(lens, dtype, gate_scale)

    actual = run(inputs, find_sequences(lens))
    expected = run_one_by_one(lens, inputs)
    upstream = torch.randn_like(expected)

    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert_close(
        grad((actual * upstream).sum(), inputs),
        grad((expected * upstream).sum(), inputs),
        rtol=tolerance,
        atol=tolerance * max(1.0, gate_scale),
    )


@needs_bfloat16
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize(
    "lens",
    [
        *LENS,
        # Whose products are summed in several parts
        pytest.param([2400, 3], id="long"),
    ],
)
def test_rows_of_bfloat16_are_rounded_only_where_they_are_multiplied_or_written(
    lens: list[int],
) -> None:
    torch.manual_seed(0)
    *rows, gates = make_inputs(lens, torch.float32, 1.0)
    inputs = [*(x.detach().bfloat16().requires_grad_() for x in rows), gates]
    wide = [x.detach().double().requires_grad_() for x in inputs]

    actual = run(inputs, find_sequences(lens))
    expected = run_one_by_one(lens, wide)
    upstream = torch.randn_like(actual)

    actual_grads = grad(actual, inputs, upstream)
    expected_grads = grad(expected, wide, upstream.double())
    assert [x.dtype for x in (actual, *actual_grads)] == [
        *([torch.bfloat16] * 4),
        torch.float32,
    ]
    # 8 bits of the squares, of their gradients and of each result; sums cancel.
    for x, y in zip((actual, *actual_grads), (expected, *expected_grads), strict=True):
        assert (x - y).norm() <= 2**-7 * y.norm()


def test_a_normaliser_at_its_floor_passes_its_gradient_to_the_gates() -> None:
    torch.manual_seed(0)
    inputs = make_inputs([9], torch.float64, 1.0)
    with torch.no_grad():
        # Input gates this closed leave exp(-m) above the sum of weights.
        inputs[-1][:, :NUM_HEADS] -= 6

    actual = run(inputs, find_sequences([9]))
    expected = run_one_by_one([9], inputs)

    assert_close(
        grad(actual.square().sum(), inputs),
        grad(expected.square().sum(), inputs),
        rtol=1e-9,
        atol=1e-15,
    )


def test_padding_between_sequences_gets_no_output_and_no_gradient() -> None:
    torch.manual_seed(0)
    inputs = make_inputs([6], torch.float64, 1.0)

    output = run(inputs, Sequences([0, 5], [4, 2]))
    grads = grad(output.sum(), inputs)

    assert not output[4].any()
    assert not output[7:].any()
    assert all(not x[4].any() for x in grads)


def test_without_a_sequence_all_gradients_are_zero() -> None:
    inputs = make_inputs([], torch.float64, 1.0)

    output = run(inputs, Sequences([0], [0]))

    assert not output.any()
    assert all(not x.any() for x in grad(output.sum(), inputs))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    lens = [70, 3, 80]
    inputs = make_inputs(lens, torch.float32, 1.0)
    num_threads = torch.get_num_threads()

    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            output = run(inputs, find_sequences(lens))
            results.append([output, *grad(output.square().sum(), inputs)])
    finally:
        torch.set_num_threads(num_threads)

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
