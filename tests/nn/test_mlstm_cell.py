"""Tests of `moxe_plugin.nn.mlstm_cell`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, float64
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.mlstm_cell import (
    NORMALIZER_EPS,
    MLSTMMemory,
    best_chunk_size,
    mlstm_chunkwise,
    mlstm_parallel,
    mlstm_step,
)
from moxe_plugin.nn.padding import EMPTY

N, H, S, D = 3, 2, 11, 5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Form = Callable[..., tuple[Tensor, MLSTMMemory]]


def make_inputs(device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, device=device, dtype=float64)).requires_grad_()

    vectors, gates = (N, H, S, D), (N, H, S)

    return (
        randn(*vectors),
        randn(*vectors),
        randn(*vectors),
        randn(*gates),
        randn(*gates),
    )


def make_memory(device: torch.device) -> MLSTMMemory:
    shapes = [(N, H, D, D), (N, H, D), (N, H)]

    return MLSTMMemory(
        *(torch.randn(s, device=device, dtype=float64).requires_grad_() for s in shapes)
    )


def empty_memory(device: torch.device) -> MLSTMMemory:
    c, n, m = (torch.zeros_like(x) for x in make_memory(device))

    return MLSTMMemory(c, n, m + EMPTY)


def run_steps(
    inputs: Sequence[Tensor], memory: MLSTMMemory | None
) -> tuple[Tensor, MLSTMMemory]:
    q, k, v, i, f = inputs
    memory = empty_memory(q.device) if memory is None else memory
    outputs = []

    for t in range(q.size(-2)):
        h, memory = mlstm_step(
            q[..., t, :], k[..., t, :], v[..., t, :], i[..., t], f[..., t], memory
        )
        outputs.append(h)

    return torch.stack(outputs, dim=-2), memory


def gradients(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Differentiate a random but fixed combination of all results."""
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (
            r * torch.randn(r.shape, generator=generator, dtype=r.dtype).to(r.device)
        ).sum()
        for r in results
    )

    return list(grad(loss, inputs))  # type: ignore[arg-type]  # sum starts at int 0


def test_step_is_the_unstabilised_recurrence(device: torch.device) -> None:
    q, k, v, i, f = (x.detach() for x in make_inputs(device))
    h, memory = run_steps([q, k, v, i, f], None)

    c = torch.zeros(N, H, D, D, device=device, dtype=float64)
    n = torch.zeros(N, H, D, device=device, dtype=float64)
    m = torch.full((N, H), -math.inf, device=device, dtype=float64)
    for t in range(S):
        kept, added = f[..., t].sigmoid(), i[..., t].exp()
        key = k[..., t, :] / math.sqrt(D)
        c = kept[..., None, None] * c + added[..., None, None] * torch.einsum(
            "nhi,nho->nhio", key, v[..., t, :]
        )
        n = kept[..., None] * n + added[..., None] * key
        m = torch.maximum(m + kept.log(), i[..., t])

        query = q[..., t, :]
        floor = (query * n).sum(-1).abs().clamp(min=1.0)
        expected = torch.einsum("nhi,nhio->nho", query, c)
        # The stabilised form adds its constant at the scale of the stabiliser.
        expected = expected / (floor + NORMALIZER_EPS * m.exp())[..., None]
        assert_close(h[..., t, :], expected)

    scale = memory.m.exp()
    assert_close(memory.c * scale[..., None, None], c)
    assert_close(memory.n * scale[..., None], n)
    assert_close(memory.m, m)


def test_parallel_form_is_the_decay_matrix_form(device: torch.device) -> None:
    q, k, v, i, f = (x.detach() for x in make_inputs(device))

    decay = f.sigmoid().log().cumsum(-1)
    log_d = decay[..., :, None] - decay[..., None, :] + i[..., None, :]
    past = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    log_d = log_d.masked_fill(~past, -math.inf)
    m = log_d.amax(-1, keepdim=True)
    weights = (q @ k.mT / math.sqrt(D)) * (log_d - m).exp()
    floor = torch.maximum(weights.sum(-1, keepdim=True).abs(), (-m).exp())

    expected = weights @ v / (floor + NORMALIZER_EPS)
    assert_close(mlstm_parallel(q, k, v, i, f)[0], expected)


@pytest.mark.parametrize("with_memory", [False, True], ids=["empty", "with_memory"])
@pytest.mark.parametrize(
    "form",
    [mlstm_parallel]
    + [partial(mlstm_chunkwise, chunk_size=size) for size in (1, 4, 11, 64)],
    ids=["parallel", "chunks_1", "chunks_4", "chunks_11", "chunks_64"],
)
def test_forms_agree_with_steps_in_values_and_gradients(
    form: Form, with_memory: bool, device: torch.device
) -> None:
    inputs = make_inputs(device)
    memory = make_memory(device) if with_memory else None
    leaves = [*inputs, *(memory or ())]

    expected_h, expected_memory = run_steps(inputs, memory)
    h, final = form(*inputs, memory)

    assert_close(h, expected_h)
    assert_close(final, expected_memory)
    assert_close(
        gradients([h, *final], leaves),
        gradients([expected_h, *expected_memory], leaves),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("with_memory", [False, True], ids=["empty", "with_memory"])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_padding_is_as_if_it_were_not_there(
    chunk_size: int, with_memory: bool, device: torch.device
) -> None:
    inputs = make_inputs(device)
    memory = make_memory(device) if with_memory else None
    leaves = [*inputs, *(memory or ())]
    seq_lens = torch.tensor([0, 11, 6], device=device)

    h, final = mlstm_chunkwise(
        *inputs, memory, seq_lens[:, None], chunk_size=chunk_size
    )
    assert final is not None
    results, expected = [], []

    for row, length in enumerate(seq_lens.tolist()):
        before = memory if with_memory and memory else empty_memory(device)
        alone = MLSTMMemory(*(x[row : row + 1] for x in before))
        if length > 0:
            row_h, alone = run_steps(
                [x[row : row + 1, :, :length] for x in inputs], alone
            )
            results.append(h[row : row + 1, :, :length])
            expected.append(row_h)
        results += [x[row : row + 1] for x in final]
        expected += alone

    assert_close(results, expected)
    assert_close(
        gradients(results, leaves),
        gradients([x.clone().requires_grad_() for x in expected], leaves),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("input_preact", [-80.0, 80.0, 1e4, -1e4])
@pytest.mark.parametrize("forget_preact", [-80.0, 80.0, -1e4])
def test_extreme_gates_give_finite_values_and_gradients(
    input_preact: float, forget_preact: float, chunk_size: int, device: torch.device
) -> None:
    q, k, v, i, f = (x.detach().float() for x in make_inputs(device))
    i[..., ::2], f[..., 1::3] = input_preact, forget_preact
    inputs = (q, k, v, i, f)
    for x in inputs:
        x.requires_grad_()
    seq_lens = torch.tensor([0, 11, 6], device=device)[:, None]

    h, memory = mlstm_chunkwise(*inputs, None, seq_lens, chunk_size=chunk_size)
    assert memory is not None

    for x in (h, *memory, *gradients([h, *memory], inputs)):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("seq_len", "head_dim", "expected"),
    [(1, 48, 1), (64, 48, 64), (256, 48, 64), (256, 320, 256), (4096, 320, 64)],
)
def test_chunks_pay_off_for_long_sequences_and_narrow_heads(
    seq_len: int, head_dim: int, expected: int
) -> None:
    assert best_chunk_size(seq_len, head_dim) == expected


@pytest.mark.parametrize(
    "form",
    [mlstm_parallel, partial(mlstm_chunkwise, chunk_size=4)],
    ids=["parallel", "chunkwise"],
)
def test_no_position_leaves_the_memory_as_it_is(
    form: Form, device: torch.device
) -> None:
    q, k, v, i, f = make_inputs(device)
    nothing = (*(x[..., :0, :] for x in (q, k, v)), *(x[..., :0] for x in (i, f)))
    memory = make_memory(device)

    for given, expected in ((memory, memory), (None, empty_memory(device))):
        outputs, last = form(*nothing, given)

        assert outputs.shape == (N, H, 0, D)
        assert_close(list(last), list(expected), rtol=0, atol=0)
