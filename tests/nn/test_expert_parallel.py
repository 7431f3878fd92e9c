"""Experts in two processes equal experts in one: outputs, states and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, float64

from moxe_plugin.nn.expert_parallel import ExpertParallelExperts
from moxe_plugin.nn.expert_states import ExpertsState
from moxe_plugin.nn.experts import SparseExperts
from tests.nn.expert_cases import (
    MODEL_DIM,
    Case,
    Split,
    apply,
    create_bank,
    make_experts,
)
from tests.processes import run_processes

NUM_PROCESSES, TOP_K, SEQ_LEN = 2, 2, 9

NUM_SEQS = [3, 2]
"""Of each process"""

LENS = [[9, 0, 4], [5, 9]]

KINDS = ("mlstm", "slstm", "ffn")

SPLITS = [
    pytest.param((2, 4, 0), id="both"),
    pytest.param((4, 0, 0), id="mlstm"),
    pytest.param((0, 0, 6), id="ffn"),
]


def _make_cases(
    num_experts: int, *, has_padding: bool, targets: list[int] | None
) -> list[Case]:
    cases = []

    for rank, num_seqs in enumerate(NUM_SEQS):
        shape = (num_seqs, SEQ_LEN)

        scores = torch.rand(*shape, num_experts)

        if targets is not None:
            # Nobody else gets a token.
            scores[..., targets] += 1.0

        cases.append(
            Case(
                torch.randn(*shape, MODEL_DIM, dtype=float64, requires_grad=True),
                scores.topk(TOP_K, dim=-1).indices,
                torch.rand(*shape, TOP_K, dtype=float64, requires_grad=True),
                torch.tensor(LENS[rank]) if has_padding else None,
            )
        )

    return cases


def _make_share(
    experts: SparseExperts, split: Split, rank: int
) -> ExpertParallelExperts:
    group = dist.group.WORLD
    assert group is not None

    banks = {
        kind: create_bank(kind, size // NUM_PROCESSES)
        for kind, size in zip(KINDS, split, strict=True)
        if size
    }

    share = ExpertParallelExperts(group, **banks)
    share.to(float64)

    share.load_state_dict(
        {n: p.chunk(NUM_PROCESSES)[rank] for n, p in experts.state_dict().items()}
    )

    return share


def _compute_loss(output: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)

    return (output * torch.randn(output.shape, generator=generator)).sum()


def _compare(split: Split, has_padding: bool, targets: list[int] | None) -> int:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    # Both processes draw the same.
    torch.manual_seed(3)

    experts = make_experts("subsequence", split, torch.device("cpu"))

    cases = _make_cases(sum(split), has_padding=has_padding, targets=targets)

    expected = [apply(experts, case)[0] for case in cases]

    for source, output in enumerate(expected):
        torch.autograd.backward(_compute_loss(output, source))

    own = cases[rank]._replace(
        seqs=cases[rank].seqs.detach().requires_grad_(),
        weights=cases[rank].weights.detach().requires_grad_(),
    )

    share = _make_share(experts, split, rank)

    output, _ = apply(share, own)
    torch.autograd.backward(_compute_loss(output, rank))

    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "output": (output, expected[rank]),
        "seqs": (own.seqs.grad, cases[rank].seqs.grad),
        "weights": (own.weights.grad, cases[rank].weights.grad),
    }

    for (name, param), full in zip(
        share.named_parameters(), experts.parameters(), strict=True
    ):
        assert full.grad is not None

        pairs[name] = (param.grad, full.grad.chunk(NUM_PROCESSES)[rank])

    for name, (actual, wanted) in pairs.items():
        torch.testing.assert_close(
            actual,
            wanted,
            rtol=1e-10,
            atol=1e-12,
            msg=lambda m, n=name: f"{n}: {m}",  # type: ignore[misc]  # bound
        )

    grads = [p.grad for p in share.parameters()]

    return sum(int(g.count_nonzero()) for g in grads if g is not None)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("has_padding", [False, True], ids=["full", "padded"])
def test_experts_of_two_processes_compute_what_one_does(
    split: Split, has_padding: bool
) -> None:
    counts = run_processes(NUM_PROCESSES, _compare, split, has_padding, None)

    assert all(counts)


def test_process_whose_experts_get_no_token_waits_for_nothing() -> None:
    # Of two mLSTM and four sLSTM experts, process 0 has 0, 2 and 3.
    counts = run_processes(NUM_PROCESSES, _compare, (2, 4, 0), False, [0, 2])

    assert counts[0] > 0
    assert counts[1] == 0


def _continue() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    torch.manual_seed(4)

    split = (2, 2, 0)
    experts = make_experts("subsequence", split, torch.device("cpu"))

    case = _make_cases(4, has_padding=False, targets=None)[rank]

    share = _make_share(experts, split, rank)

    with torch.no_grad():
        expected, _ = apply(experts, case)

        state: ExpertsState | None = None
        outputs: list[Tensor] = []

        for begin, end in ((0, 4), (4, 5), (5, SEQ_LEN)):
            chunk = case.cut(slice(None), slice(begin, end))

            output, state = apply(share, chunk, state)
            outputs.append(output)

    assert state is not None
    assert state.mlstm is not None

    # One expert of each kind, and the sequences of both
    assert {tuple(t.shape[:2]) for t in state.mlstm} == {(1, sum(NUM_SEQS))}

    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-12)


def test_states_stay_with_the_experts_between_chunks() -> None:
    run_processes(NUM_PROCESSES, _continue)
