"""Tests of `moxe_plugin.nn.experts` and `moxe_plugin.nn.dispatch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.testing import assert_close
from typing_extensions import override

from moxe_plugin.nn.expert_layouts import ExpertStateKind
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.routing import StandardRouter
from moxe_plugin.nn.selection import TopKSelection
from tests.nn.expert_cases import (
    EXPERT_STATES,
    LENS,
    MODEL_DIM,
    NUM_EXPERTS,
    NUM_SEQS,
    RECURRENT,
    SEQ_LEN,
    SPLITS,
    TOP_K,
    VARIES,
    Case,
    Split,
    apply,
    create_bank,
    make_case,
    make_experts,
)


def iter_experts(experts: SparseExperts) -> Iterator[tuple[str, int, Any]]:
    for kind, bank in experts.named_children():
        single = create_bank(kind, None).to(float64)

        for e in range(next(bank.parameters()).size(0)):
            params = {name: param[e] for name, param in bank.named_parameters()}

            def run(
                x: Tensor, single: Module = single, params: Any = params
            ) -> tuple[Tensor, Any]:
                output = functional_call(single, params, (x.unsqueeze(0),))
                return output if isinstance(output, tuple) else (output, None)

            yield kind, e, run


def apply_naively(
    experts: SparseExperts, case: Case, expert_state: ExpertStateKind
) -> tuple[Tensor, dict[tuple[str, int, int], Any]]:
    """Apply each expert to each sequence, one at a time."""
    seqs, indices = case.seqs, case.indices.tolist()

    sums = {
        (n, s): torch.zeros_like(seqs[0, 0])
        for n in range(seqs.size(0))
        for s in range(seqs.size(1))
    }
    states = {}

    for idx, (kind, e, run) in enumerate(iter_experts(experts)):
        for n in range(seqs.size(0)):
            num_tokens = (
                seqs.size(1) if case.seq_lens is None else int(case.seq_lens[n])
            )
            chosen = [s for s in range(num_tokens) if idx in indices[n][s]]
            seen = list(range(num_tokens)) if expert_state == "dense" else chosen

            outputs = {}

            if expert_state == "token":
                outputs = {s: run(seqs[n, [s]])[0][0, 0] for s in seen}
            elif seen:
                output, states[kind, e, n] = run(seqs[n, seen])
                outputs = dict(zip(seen, output[0], strict=True))
            elif kind != "ffn":
                block: Any = create_bank(kind, None).to(seqs)
                states[kind, e, n] = block.initial_state(1)

            for s in chosen:
                weight = case.weights[n, s, indices[n][s].index(idx)]
                sums[n, s] = sums[n, s] + weight * outputs[s]

    return torch.stack(list(sums.values())).view_as(seqs), states


@VARIES
@pytest.mark.parametrize("seq_lens", LENS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_dispatch_equals_every_expert_on_its_own_tokens(
    expert_state: ExpertStateKind,
    split: Split,
    seq_lens: list[int] | None,
    varies: bool,
    device: torch.device,
) -> None:
    experts = make_experts(expert_state, split, device)
    case = make_case(device, seq_lens, varies=varies)

    leaves = [
        case.seqs.requires_grad_(),
        case.weights.requires_grad_(),
        *experts.parameters(),
    ]

    output, state = apply(experts, case)
    expected, expected_states = apply_naively(experts, case, expert_state)

    assert_close(output, expected, rtol=1e-9, atol=1e-10)

    projection = torch.randn_like(output)

    grads = torch.autograd.grad(output, leaves, projection)
    expected_grads = torch.autograd.grad(
        expected, leaves, projection, materialize_grads=True
    )

    assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)

    # As in training, where tokens may be sent in another way.
    output, no_state = experts(
        case.seqs, case.routing, case.seq_lens, return_state=False
    )
    grads = torch.autograd.grad(output, leaves, projection)

    assert no_state is None
    assert_close(output, expected, rtol=1e-9, atol=1e-10)
    assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)

    if expert_state == "token":
        assert state is None
        return

    assert state is not None

    for (kind, e, n), expected_state in expected_states.items():
        if kind == "ffn":
            assert state == (None, None)
            continue

        for actual, reference in zip(getattr(state, kind), expected_state, strict=True):
            assert_close(actual[e, n], reference[0], rtol=1e-9, atol=1e-10)


@VARIES
@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_later_tokens_do_not_reach_earlier_outputs(
    expert_state: ExpertStateKind, varies: bool, device: torch.device
) -> None:
    experts = make_experts(expert_state, (2, 3, 0), device)
    case, other = make_case(device, varies=varies), make_case(device, varies=varies)

    expected, _ = apply(experts, case)

    for s in range(SEQ_LEN):
        # Another token, on another route.
        changed = Case(
            torch.cat([case.seqs[:, :s], other.seqs[:, s:]], dim=1),
            torch.cat([case.indices[:, :s], other.indices[:, s:]], dim=1),
            torch.cat([case.weights[:, :s], other.weights[:, s:]], dim=1),
            None,
        )

        output, _ = apply(experts, changed)

        assert_close(output[:, :s], expected[:, :s], rtol=1e-12, atol=1e-12)
        assert not torch.isclose(output[:, s], expected[:, s]).any()


@VARIES
@pytest.mark.parametrize("seq_lens", LENS)
@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_a_sequence_alone_equals_itself_in_a_batch(
    expert_state: ExpertStateKind,
    seq_lens: list[int] | None,
    varies: bool,
    device: torch.device,
) -> None:
    experts = make_experts(expert_state, (2, 3, 0), device)
    case = make_case(device, seq_lens, varies=varies)

    output, _ = apply(experts, case)

    for n in range(NUM_SEQS):
        num_tokens = SEQ_LEN if seq_lens is None else seq_lens[n]

        if num_tokens > 0:
            alone = case.cut(slice(n, n + 1), slice(num_tokens))
            expected, _ = apply(experts, alone)

            assert_close(output[n, :num_tokens], expected[0], rtol=1e-12, atol=1e-12)


@VARIES
@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_right_padding_changes_nothing(
    expert_state: ExpertStateKind, varies: bool, device: torch.device
) -> None:
    experts = make_experts(expert_state, (2, 3, 0), device)
    case, garbage = (
        make_case(device, [11, 0, 7], varies=varies),
        make_case(device, varies=varies),
    )

    assert case.seq_lens is not None

    positions = torch.arange(SEQ_LEN, device=device)
    mask = (positions < case.seq_lens.unsqueeze(-1)).unsqueeze(-1)

    changed = Case(
        case.seqs.where(mask, 1e3 * garbage.seqs).requires_grad_(),
        case.indices.where(mask, garbage.indices),
        case.weights.where(mask, garbage.weights).requires_grad_(),
        case.seq_lens,
    )

    output, state = apply(experts, changed)
    expected, expected_state = apply(experts, case)

    assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    assert not output.masked_fill(mask, 0.0).any()

    for grad in torch.autograd.grad(output.sum(), [changed.seqs, changed.weights]):
        assert not grad.masked_fill(mask, 0.0).any()
        assert grad.isfinite().all()


@VARIES
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("expert_state", RECURRENT)
def test_chunks_with_state_equal_the_whole(
    expert_state: ExpertStateKind, split: Split, varies: bool, device: torch.device
) -> None:
    experts = make_experts(expert_state, split, device)
    case = make_case(device, varies=varies)

    expected, expected_state = apply(experts, case)

    outputs, state, begin = [], None, 0

    for size in [1, 4, 1, 1, 3, 1]:
        chunk = case.cut(slice(None), slice(begin, begin + size))
        output, state = apply(experts, chunk, state)

        outputs.append(output)
        begin += size

    assert begin == SEQ_LEN
    assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-10)
    assert_close(state, expected_state, rtol=1e-9, atol=1e-10)


def test_state_of_an_expert_without_a_token_waits_unchanged(
    device: torch.device,
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)

    _, state = apply(experts, make_case(device))

    # The first sequence goes on with experts 0 and 3 only.
    case = make_case(device)
    case.indices[0] = tensor([0, 3], device=device)

    _, next_state = apply(experts, case, state)

    assert state is not None
    assert state.mlstm is not None
    assert state.slstm is not None
    assert next_state is not None
    assert next_state.mlstm is not None
    assert next_state.slstm is not None

    for before, after in zip(state.mlstm, next_state.mlstm, strict=True):
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0, 0], after[0, 0])

    for before, after in zip(state.slstm, next_state.slstm, strict=True):
        # Experts 2 and 4 of the layer
        assert torch.equal(before[0, 0], after[0, 0])
        assert torch.equal(before[2, 0], after[2, 0])
        assert not torch.equal(before[1, 0], after[1, 0])


class PreviousToken(Module):
    """Experts that return what they saw just before, to see what they remember."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()

        self.weight = Parameter(torch.ones(num_experts, 1))
        self.grid_shapes: list[torch.Size] = []

    @override
    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None,
        state: Tensor | None,
        *,
        return_state: bool,
    ) -> tuple[Tensor, None]:
        assert state is None

        self.grid_shapes.append(seqs.shape)

        return torch.nn.functional.pad(seqs, (0, 0, 1, 0))[..., :-1, :], None


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("seq_len", [5, 301])
def test_an_expert_remembers_its_own_tokens_of_its_own_sequence_in_order(
    seq_len: int, top_k: int, device: torch.device
) -> None:
    experts = SparseExperts(4, mlstm=PreviousToken(3), slstm=PreviousToken(1))

    ids = torch.arange(1.0, 1 + NUM_SEQS * seq_len, device=device)
    indices = torch.rand(ids.numel(), 4, device=device).topk(top_k).indices

    weights = torch.zeros(ids.numel(), top_k, device=device)
    weights[:, -1] = 1.0

    case = Case(
        ids.view(NUM_SEQS, seq_len, 1),
        indices.view(NUM_SEQS, seq_len, top_k),
        weights.view(NUM_SEQS, seq_len, top_k),
        seq_lens=None,
    )

    output, _ = apply(experts, case)

    previous: dict[tuple[int, int], float] = {}
    expected = []

    for t, chosen in enumerate(indices.tolist()):
        n = t // seq_len

        expected.append(previous.get((n, chosen[-1]), 0.0))

        previous.update({(n, e): t + 1.0 for e in chosen})

    assert output.flatten().tolist() == expected


def test_only_chosen_experts_compute(device: torch.device) -> None:
    indices = tensor([[0], [0], [2], [0], [1], [2]], device=device).view(2, 3, 1)

    case = Case(
        torch.ones(2, 3, 1, device=device),
        indices,
        torch.ones(2, 3, 1, device=device),
        tensor([3, 2], device=device),
    )

    shapes: dict[ExpertStateKind, list[torch.Size]] = {}

    for expert_state in EXPERT_STATES:
        mlstm, slstm = PreviousToken(2), PreviousToken(2)

        apply(
            SparseExperts(4, mlstm=mlstm, slstm=slstm, expert_state=expert_state), case
        )

        shapes[expert_state] = mlstm.grid_shapes + slstm.grid_shapes

    assert shapes == {
        "subsequence": [(2, 2, 2, 1), (2, 2, 1, 1)],
        "token": [(2, 3, 1, 1), (2, 1, 1, 1)],
        "dense": [(2, 2, 3, 1), (2, 2, 3, 1)],
    }


@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_every_parameter_gets_a_gradient_even_if_no_token_comes(
    expert_state: ExpertStateKind, device: torch.device
) -> None:
    experts = make_experts(expert_state, (2, 3, 0), device)
    case = make_case(device, [0, 0, 0])

    output, _ = apply(experts, case)

    assert not output.any()

    torch.autograd.backward(output.sum())

    for param in experts.parameters():
        assert param.grad is not None
        assert not param.grad.any()


@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_two_runs_are_bitwise_equal(
    expert_state: ExpertStateKind, device: torch.device
) -> None:
    experts = make_experts(expert_state, (2, 3, 0), device).float()
    router = StandardRouter(MODEL_DIM, TopKSelection(NUM_EXPERTS, TOP_K)).to(device)

    seqs = torch.randn(NUM_SEQS, 65, MODEL_DIM, device=device, requires_grad=True)
    leaves = [seqs, *experts.parameters(), *router.parameters()]

    def run() -> list[Tensor]:
        output, _ = experts(seqs, router(seqs.flatten(0, 1)))

        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("expert_state", EXPERT_STATES)
def test_outputs_are_summed_in_float32(
    expert_state: ExpertStateKind, device: torch.device
) -> None:
    experts = make_experts(expert_state, (0, 0, 5), device).bfloat16()
    case = make_case(device)
    case = case._replace(seqs=case.seqs.bfloat16(), weights=case.weights.float())

    output, _ = apply(experts, case)

    assert output.dtype == torch.bfloat16

    ffn = experts.get_submodule("ffn")
    outputs = ffn(case.seqs.expand(NUM_EXPERTS, *case.seqs.shape)).double()

    expected = torch.zeros_like(case.seqs, dtype=float64)
    for k in range(TOP_K):
        index = case.indices[..., k].expand(1, MODEL_DIM, -1, -1).permute(0, 2, 3, 1)
        expected += case.weights[..., [k]] * outputs.gather(0, index)[0]

    # One rounding of the sum to 8 bits
    assert_close(output.double(), expected, rtol=2**-8, atol=1e-6)


def test_wanting_no_state_gives_none(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case = make_case(device)

    _, state = experts(case.seqs, case.routing, return_state=False)

    assert state is None


def test_a_wrong_number_of_experts_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must have `num_experts` \(8\) experts in all, but have 5"
    ):
        SparseExperts(8, mlstm=PreviousToken(2), slstm=PreviousToken(3))


def test_feed_forward_experts_beside_others_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^`ffn` must be None when `mlstm` or `slstm`"
    ):
        SparseExperts(4, mlstm=PreviousToken(2), ffn=PreviousToken(2))


def test_an_unknown_expert_state_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"^`expert_state` must be one of subsequence, token, dense, but is 'tv'",
    ):
        SparseExperts(
            2,
            mlstm=PreviousToken(2),
            expert_state="tv",  # type: ignore[arg-type]  # wrong
        )
