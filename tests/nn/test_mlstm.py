"""Tests of `moxe_plugin.nn.mlstm`; more are in `test_blocks` and `test_oracles`."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.mlstm_cell import MLSTMMemory
from moxe_plugin.nn.mlstm_recurrence import MLSTMCellInputs, MLSTMRecurrence
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.rows import find_rows


def test_initial_values_are_the_intended_ones() -> None:
    block = MLSTMBlock(64, num_heads=4, num_experts=3, num_blocks=2)

    # Five standard errors of the smallest sample.
    for weight in (block.q_proj, block.k_proj, block.v_proj):
        assert weight.std().item() == pytest.approx((2 / (5 * 32)) ** 0.5, rel=0.04)
    assert block.up_proj.std().item() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.04)
    assert block.down_proj.std().item() == pytest.approx(2 / (2 * 8), rel=0.04)
    assert block.forget_gate_bias.tolist() == [[3.0, 4.0, 5.0, 6.0]] * 3
    assert 0 < block.input_gate_bias.abs().max() < 0.5
    assert (block.skip == 1).all()
    assert not block.input_gate_weight.any()
    assert not block.forget_gate_weight.any()


@pytest.mark.parametrize("seq_len", [130, 900])
def test_large_heads_are_the_same_in_every_form(seq_len: int) -> None:
    torch.manual_seed(0)
    inputs = MLSTMCellInputs(
        torch.randn(1, seq_len, 256),
        torch.randn(1, seq_len, 256),
        torch.randn(1, seq_len, 256),
        torch.randn(1, seq_len, 2),
    )
    recurrence = MLSTMRecurrence(1, "auto")
    memory = MLSTMMemory(
        torch.zeros(1, 1, 256, 256), torch.zeros(1, 1, 256), torch.full((1, 1), EMPTY)
    )

    # In parallel, and in chunks that carry the (empty) memory.
    parallel, _ = recurrence.apply(inputs, None, None, return_memory=False)
    in_chunks, _ = recurrence.apply(inputs, None, memory, return_memory=True)
    by_torch, _ = MLSTMRecurrence(1, "torch").apply(
        inputs, None, None, return_memory=False
    )

    # Where the normaliser is near 0, single outputs are off by more.
    for output in (parallel, in_chunks):
        assert (output - by_torch).norm() < 1e-3 * by_torch.norm()


@pytest.mark.parametrize("seq_len", [5, 0])
def test_block_with_a_memory_computes_the_same_with_triton(
    seq_len: int, device: torch.device
) -> None:
    pytest.importorskip("triton")
    block = MLSTMBlock(32, num_heads=2, num_experts=2, backend="torch").to(device)
    seqs = torch.randn(2, 2, seq_len, 32, device=device)
    lens = torch.tensor([[5, 2], [0, 4]], device=device).clamp(max=seq_len)
    expected, expected_state = block(seqs, lens)
    block.backend = "triton"

    actual, state = block(seqs, lens)

    valid = torch.arange(seq_len, device=device) < lens[..., None]
    assert_close(actual[valid], expected[valid])
    assert_close(state, expected_state)


def test_backends_that_cannot_run_are_named(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    pytest.importorskip("triton")
    block = MLSTMBlock(32, num_heads=2, backend="triton")

    double = torch.zeros(1, 3, 32, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="'native' for float64, but is 'triton'"):
        block.double().to(device)(double)

    block, seqs = block.float().to("cpu"), torch.zeros(1, 3, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' with a tensor on 'cpu'"):
        block(seqs)

    block.backend = "trition"  # type: ignore[assignment]  # the mistake
    with pytest.raises(ValueError, match=r"`backend` must be one of auto, .*'trition'"):
        block(seqs)


@pytest.mark.parametrize(
    "lens",
    [
        pytest.param([[40, 7]], id="parallel"),
        pytest.param([[400, 0], [170, 31]], id="chunkwise"),
    ],
)
def test_sequences_are_the_same_in_rows_and_by_torch(lens: list[list[int]]) -> None:
    torch.manual_seed(0)
    seq_lens = torch.tensor(lens)
    rows = find_rows(seq_lens, int(seq_lens.max()))
    inputs = [torch.randn(rows.slot_of_row.numel(), n) for n in (32, 32, 32, 4)]
    inputs = [x.requires_grad_() for x in inputs]
    padded = [
        x.new_zeros(seq_lens.numel() * rows.grid_shape[-1], x.size(1))
        .index_copy(0, rows.slot_of_row, x)
        .view(*rows.grid_shape, -1)
        for x in inputs
    ]
    outputs = []

    for backend in ("auto", "torch"):
        recurrence = MLSTMRecurrence(2, backend)
        in_rows, _ = recurrence.apply_to_rows(
            MLSTMCellInputs(*inputs), rows, None, return_memory=False
        )
        batch, _ = recurrence.apply(
            MLSTMCellInputs(*padded), seq_lens, None, return_memory=False
        )
        outputs.extend([in_rows, batch.flatten(0, 2)[rows.slot_of_row]])

    upstream = torch.randn_like(outputs[0])
    results = [
        (x, *grad((x * upstream).sum(), inputs, retain_graph=True)) for x in outputs
    ]

    # Where the normaliser is near 0, single outputs are off by more.
    for result in results[:-1]:
        for x, expected in zip(result, results[-1], strict=True):
            assert (x - expected).norm() < 1e-4 * expected.norm()


def test_initial_state_is_empty() -> None:
    state = MLSTMBlock(16, num_heads=4, num_experts=3).initial_state(5)

    assert state.conv.shape == (3, 5, 3, 64)
    assert state.c.shape == (3, 5, 4, 16, 16)
    assert not torch.cat([x.flatten() for x in state[:3]]).any()
    assert (state.m == EMPTY).all()


def test_parameters_are_counted_as_in_the_authors_code() -> None:
    # SEMANTICS.md §5: an mLSTM expert at Table 1 size.
    block = MLSTMBlock(640, num_heads=4, qkv_block_size=32)

    assert sum(p.numel() for p in block.parameters()) == 2_620_808


def test_block_size_must_divide_the_inner_width() -> None:
    with pytest.raises(ValueError, match=r"`qkv_block_size` must .* is 48 instead\."):
        MLSTMBlock(64, num_heads=4, qkv_block_size=48)
