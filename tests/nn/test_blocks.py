"""What `moxe_plugin.nn.mlstm` and `moxe_plugin.nn.slstm` have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, float32, float64
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.mlstm_recurrence import MLSTMState
from moxe_plugin.nn.padding import valid_positions
from moxe_plugin.nn.slstm import SLSTMBlock
from moxe_plugin.nn.slstm_parameters import SLSTMState

E, N, S, M = 3, 4, 11, 16

Block = MLSTMBlock | SLSTMBlock
State = MLSTMState | SLSTMState
MakeBlock = Callable[[int | None], Block]


@pytest.fixture(params=["mlstm", "slstm"])
def make_block(request: pytest.FixtureRequest, device: torch.device) -> MakeBlock:
    def make(num_experts: int | None) -> Block:
        kind = MLSTMBlock if request.param == "mlstm" else SLSTMBlock
        block: Block = kind(M, num_heads=2, num_experts=num_experts)
        # At their initial values several parameters have no effect.
        for name, parameter in block.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)

        return block.to(device, float64)

    return make


def make_seqs(device: torch.device, *lead: int) -> Tensor:
    seqs = torch.randn(*lead, N, S, M, device=device, dtype=float64)

    return seqs.requires_grad_()


def make_state(block: Block, seqs: Tensor) -> State:
    """Return a state as it is after some other sequence, cut off from it."""
    with torch.no_grad():
        state = block(torch.randn_like(seqs[..., :5, :]))[1]

    return type(state)(*(x.requires_grad_() for x in state))  # type: ignore[no-any-return]  # Module.__call__


def loss_of(results: Sequence[Tensor]) -> Tensor:
    """Combine all results with random but fixed weights."""
    generator = torch.Generator().manual_seed(3)
    terms = [
        (
            r * torch.randn(r.shape, generator=generator, dtype=r.dtype).to(r.device)
        ).sum()
        for r in results
    ]

    return torch.stack(terms).sum()


def assert_same(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    leaves: Sequence[Tensor],
) -> None:
    """Compare values, and gradients with respect to ``leaves``."""
    assert_close(list(actual), list(expected))
    assert_close(
        grad(loss_of(actual), leaves, materialize_grads=True),
        grad(loss_of(expected), leaves, materialize_grads=True),
        rtol=1e-8,
        atol=1e-9,
    )


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "with_state"])
@pytest.mark.parametrize("splits", [[1] * S, [5, 6], [1, 2, 8]], ids=str)
def test_pieces_with_state_equal_the_whole(
    splits: list[int], with_state: bool, make_block: MakeBlock, device: torch.device
) -> None:
    block, seqs = make_block(None), make_seqs(device)
    state = make_state(block, seqs) if with_state else None
    leaves = [seqs, *block.parameters(), *(state or ())]

    outputs, final = block(seqs, None, state)

    pieces = []
    for piece in seqs.split(splits, dim=-2):
        output, state = block(piece, None, state)
        pieces.append(output)
    assert state is not None

    assert_same([torch.cat(pieces, dim=-2), *state], [outputs, *final], leaves)


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "with_state"])
def test_each_row_of_a_padded_batch_equals_the_row_alone(
    with_state: bool, make_block: MakeBlock, device: torch.device
) -> None:
    block, seqs = make_block(None), make_seqs(device)
    state = make_state(block, seqs) if with_state else None
    leaves = [seqs, *block.parameters(), *(state or ())]
    seq_lens = torch.tensor([0, S, 2, 7], device=device)

    outputs, final = block(seqs, seq_lens, state)
    before = block.initial_state(N) if state is None else state

    results, expected = [], []
    for row, length in enumerate(seq_lens.tolist()):
        alone = type(before)(*(x[row : row + 1] for x in before))
        if length > 0:
            output, alone = block(seqs[row : row + 1, :length], None, alone)
            results.append(outputs[row : row + 1, :length])
            expected.append(output)
        results += [x[row : row + 1] for x in final]
        expected += alone

    assert_same(results, expected, leaves)


def test_row_of_length_0_keeps_its_state_exactly(
    make_block: MakeBlock, device: torch.device
) -> None:
    block, seqs = make_block(None), make_seqs(device)
    state = make_state(block, seqs)

    _, final = block(seqs, torch.zeros(N, dtype=torch.int64, device=device), state)

    assert_close(final, state, rtol=0, atol=0)


def clear_padding(output: Tensor, seq_lens: Tensor | None) -> Tensor:
    # What a block returns there has no meaning.
    if seq_lens is None:
        return output

    return output.where(valid_positions(seq_lens, S).unsqueeze(-1), 0.0)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_stacked_blocks_equal_separate_blocks(
    padded: bool, make_block: MakeBlock, device: torch.device
) -> None:
    bank, seqs = make_block(E), make_seqs(device, E)
    state = make_state(bank, seqs)
    seq_lens = torch.randint(0, S + 1, (E, N), device=device) if padded else None

    actual, final = bank(seqs, seq_lens, state)
    assert actual.isfinite().all()
    actual = clear_padding(actual, seq_lens)
    actual_grads = grad(loss_of([actual, *final]), list(bank.parameters()))

    blocks, outputs, finals = [], [], []
    for e in range(E):
        block = make_block(None)
        block.load_state_dict({k: v[e] for k, v in bank.state_dict().items()})
        lens = None if seq_lens is None else seq_lens[e]
        output, last = block(seqs[e], lens, type(state)(*(x[e] for x in state)))
        blocks.append(list(block.parameters()))
        outputs.append(clear_padding(output, lens))
        finals.append(last)

    expected = [torch.stack(list(x)) for x in (outputs, *zip(*finals, strict=True))]
    assert_close([actual, *final], expected)

    for i, actual_grad in enumerate(actual_grads):
        expected_grad = grad(
            loss_of(expected), [block[i] for block in blocks], retain_graph=True
        )
        assert_close(actual_grad, torch.stack(expected_grad), rtol=1e-8, atol=1e-9)


def test_no_output_depends_on_later_inputs(
    make_block: MakeBlock, device: torch.device
) -> None:
    block, seqs = make_block(None), make_seqs(device).detach()
    changed = seqs.clone()
    changed[:, 6:] += 1.0

    difference = (block(seqs)[0] - block(changed)[0]).abs().amax(dim=(0, 2))

    assert (difference[:6] == 0).all()
    assert (difference[6:] > 0).all()


def test_state_can_be_left_out(make_block: MakeBlock, device: torch.device) -> None:
    block, seqs = make_block(None), make_seqs(device)

    outputs, state = block(seqs, return_state=False)

    assert state is None
    assert_close(outputs, block(seqs)[0])


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
@pytest.mark.parametrize("kind", [MLSTMBlock, SLSTMBlock], ids=["mlstm", "slstm"])
def test_bfloat16_autocast_is_close_to_float32(
    kind: type[Block], num_experts: int | None, device: torch.device
) -> None:
    # Initial values: with random ones the mLSTM divides by sums that nearly cancel.
    block = kind(M, num_heads=2, num_experts=num_experts).to(device)
    lead = () if num_experts is None else (num_experts,)
    seqs = make_seqs(device, *lead).detach().float()
    lens = torch.randint(0, S + 1, (*lead, N), device=device)
    valid = torch.arange(S, device=device)[:, None] < lens[..., None, None]
    direction = torch.randn_like(seqs) * valid

    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs, state = block(seqs, lens)
    actual = grad((outputs * direction).sum(), list(block.parameters()))

    expected_outputs, _ = block(seqs, lens)
    expected = grad((expected_outputs * direction).sum(), list(block.parameters()))

    # bfloat16 has 8 bits of precision and a block rounds about ten times in a row.
    tolerance = 10 * 2**-8
    error = (outputs - expected_outputs) * valid
    assert error.norm() < tolerance * (expected_outputs * valid).norm()
    for x in state[1:]:
        assert x.dtype == float32
    # As one vector: the norm per head all but cancels the gradient of i's bias.
    actual_grad, expected_grad = (
        torch.cat([x.flatten() for x in gradients]) for gradients in (actual, expected)
    )
    assert (actual_grad - expected_grad).norm() < tolerance * expected_grad.norm()


def test_bfloat16_parameters_give_finite_gradients_and_float32_states(
    make_block: MakeBlock, device: torch.device
) -> None:
    block = make_block(E).to(torch.bfloat16)
    seqs = make_seqs(device, E).detach().bfloat16()

    outputs, state = block(seqs, torch.randint(0, S + 1, (E, N), device=device))
    assert outputs.dtype == torch.bfloat16
    for x in state[1:]:
        assert x.dtype == float32
    for x in grad(outputs.sum(), list(block.parameters())):
        assert x.isfinite().all()


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
@pytest.mark.parametrize("kind", [MLSTMBlock, SLSTMBlock], ids=["mlstm", "slstm"])
def test_meta_block_is_initialised_like_any_other(
    kind: type[Block], num_experts: int | None, device: torch.device
) -> None:
    with torch.device("meta"):
        block = kind(M, num_heads=2, num_experts=num_experts)
    block.to_empty(device=device)
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, torch.nan)

    torch.manual_seed(5)
    for module in block.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()  # type: ignore[operator]  # all of ours have it

    assert not list(block.buffers())
    for parameter in block.parameters():
        assert parameter.isfinite().all()
        assert parameter.ndim > 0


@pytest.mark.parametrize("kind", [MLSTMBlock, SLSTMBlock], ids=["mlstm", "slstm"])
def test_heads_must_divide_the_width(kind: type[Block]) -> None:
    with pytest.raises(ValueError, match=r"`num_heads` must divide .* is 3 instead\."):
        kind(M, num_heads=3)
