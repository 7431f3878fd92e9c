"""Tests of `moxe_plugin.nn.native.mlstm_chunkwise`, against the reference in torch."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.mlstm_cell import MAX_EXPONENT, NORMALIZER_EPS, mlstm_chunkwise
from moxe_plugin.nn.native.causal_squares import Sequences
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.mlstm_chunkwise import MLSTMChunkwiseForm
from moxe_plugin.nn.native.mlstm_forms import NormalizerLimits, run_form

LIMITS = NormalizerLimits(MAX_EXPONENT, NORMALIZER_EPS)
NUM_HEADS = 2
NUM_PADDING = 3

pytestmark = pytest.mark.skipif(
    why_not_loaded("mlstm_chunkwise") is not None,
    reason=f"no C++ here: {why_not_loaded('mlstm_chunkwise')}",
)


def make_inputs(
    lens: list[int], dtype: torch.dtype, gate_scale: float = 1.0, head_dim: int = 7
) -> list[Tensor]:
    num_rows = sum(lens) + NUM_PADDING
    shapes = [(num_rows, NUM_HEADS, head_dim)] * 3 + [(num_rows, 2 * NUM_HEADS)]
    inputs = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    # Memories that last beyond a chunk.
    inputs[-1][:, NUM_HEADS:] += 3
    inputs[-1] *= gate_scale

    return [x.requires_grad_() for x in inputs]


def find_sequences(lens: list[int]) -> Sequences:
    return Sequences([0, *accumulate(lens)][:-1], lens)


def run(inputs: list[Tensor], seqs: Sequences, chunk_size: int = 5) -> Tensor:
    q, k, v, gates = inputs

    form = MLSTMChunkwiseForm(seqs, NUM_HEADS, LIMITS, chunk_size)

    return run_form(form, q, k, v, gates)


def run_one_by_one(
    lens: list[int], inputs: list[Tensor], chunk_size: int = 5
) -> Tensor:
    q, k, v, gates = inputs
    outputs = []

    for begin, length in zip(*find_sequences(lens), strict=True):
        if length == 0:
            continue

        rows = slice(begin, begin + length)
        # (S,2H) -> two of (H,S)
        input_preact, forget_preact = gates[rows].t().chunk(2)
        output, _ = mlstm_chunkwise(
            q[rows].transpose(0, 1),
            k[rows].transpose(0, 1),
            v[rows].transpose(0, 1),
            input_preact,
            forget_preact,
            chunk_size=chunk_size,
            return_memory=False,
        )
        outputs.append(output.transpose(0, 1))

    return torch.cat([*outputs, q.new_zeros(NUM_PADDING, *q.shape[1:])])


@pytest.mark.parametrize(
    ("dtype", "gate_scale", "tolerance"),
    [
        (torch.float64, 1.0, 1e-11),
        (torch.float64, 30.0, 1e-11),
        (torch.float64, 300.0, 1e-11),
        (torch.float32, 1.0, 2e-4),
    ],
)
@pytest.mark.parametrize(
    ("lens", "chunk_size"),
    [
        pytest.param([5], 5, id="one-chunk"),
        pytest.param([17], 5, id="one-sequence"),
        pytest.param([1, 0, 23, 3, 10], 5, id="ragged"),
        pytest.param([300, 64, 131], 130, id="several-blocks"),
    ],
)
def test_rows_are_sequences_by_themselves_with_all_gradients(
    lens: list[int],
    chunk_size: int,
    dtype: torch.dtype,
    gate_scale: float,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(lens, dtype, gate_scale)

    actual = run(inputs, find_sequences(lens), chunk_size)
    expected = run_one_by_one(lens, inputs, chunk_size)
    upstream = torch.randn_like(expected)

    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert_close(
        grad((actual * upstream).sum(), inputs),
        grad((expected * upstream).sum(), inputs),
        rtol=tolerance,
        atol=tolerance * max(1.0, gate_scale),
    )


def test_bfloat16_is_rounded_only_where_it_is_written() -> None:
    torch.manual_seed(0)
    lens = [200, 0, 77, 1]
    *rows, gates = make_inputs(lens, torch.float32, head_dim=48)
    inputs = [*(x.detach().bfloat16().requires_grad_() for x in rows), gates]
    wide = [x.detach().float().requires_grad_() for x in inputs]

    output = run(inputs, find_sequences(lens), chunk_size=64)
    upstream = torch.randn_like(output)
    actual = [output, *grad(output, inputs, upstream)]
    output = run(wide, find_sequences(lens), chunk_size=64)
    expected = [output, *grad(output, wide, upstream.float())]

    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y.to(x.dtype))
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]


def test_float32_is_as_near_to_float64_as_the_reference() -> None:
    torch.manual_seed(0)
    lens = [200, 77]
    wide = make_inputs(lens, torch.float64, head_dim=48)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    upstream = torch.randn_like(wide[0])

    expected = run_one_by_one(lens, wide, chunk_size=64)
    actual = run(narrow, find_sequences(lens), chunk_size=64)
    pairs = zip(
        [actual, *grad((actual * upstream.float()).sum(), narrow)],
        [expected, *grad((expected * upstream).sum(), wide)],
        strict=True,
    )

    for x, y in pairs:
        assert (x - y).norm() < 1e-5 * y.norm()


def test_a_normaliser_at_its_floor_passes_its_gradient_to_the_gates() -> None:
    torch.manual_seed(0)
    inputs = make_inputs([19], torch.float64)
    with torch.no_grad():
        # Input gates this closed leave exp(-m) above the sum of weights.
        inputs[-1][:, :NUM_HEADS] -= 6

    actual = run(inputs, find_sequences([19]))
    expected = run_one_by_one([19], inputs)

    assert_close(
        grad(actual.square().sum(), inputs),
        grad(expected.square().sum(), inputs),
        rtol=1e-9,
        atol=1e-15,
    )


def test_padding_between_sequences_gets_no_output_and_no_gradient() -> None:
    torch.manual_seed(0)
    inputs = make_inputs([16], torch.float64)

    output = run(inputs, Sequences([0, 10], [9, 6]))
    grads = grad(output.sum(), inputs)

    assert not output[9].any()
    assert not output[16:].any()
    assert all(not x[9].any() for x in grads)


def test_without_a_sequence_all_gradients_are_zero() -> None:
    inputs = make_inputs([], torch.float64)

    output = run(inputs, Sequences([0], [0]))

    assert not output.any()
    assert all(not x.any() for x in grad(output.sum(), inputs))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    lens = [70, 3, 80]
    inputs = make_inputs(lens, torch.float32, head_dim=40)
    num_threads = torch.get_num_threads()

    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            output = run(inputs, find_sequences(lens), chunk_size=32)
            results.append([output, *grad(output.square().sum(), inputs)])
    finally:
        torch.set_num_threads(num_threads)

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
