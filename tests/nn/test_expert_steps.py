"""Tests of `moxe_plugin.nn.expert_steps`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.nn import Module, Parameter
from torch.testing import assert_close
from typing_extensions import override

from moxe_plugin.nn.expert_layouts import ExpertStateKind
from moxe_plugin.nn.experts import SparseExperts
from tests.nn.expert_cases import (
    LENS,
    SEQ_LEN,
    SPLITS,
    VARIES,
    Case,
    Split,
    apply,
    make_case,
    make_experts,
)

SPARSE: list[ExpertStateKind] = ["subsequence", "token"]

NUM_SEQS = pytest.mark.parametrize("num_seqs", [1, 3])


@VARIES
@NUM_SEQS
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("expert_state", SPARSE)
def test_steps_equal_the_whole(
    expert_state: ExpertStateKind,
    split: Split,
    num_seqs: int,
    varies: bool,
    device: torch.device,
) -> None:
    experts = make_experts(expert_state, split, device)
    case = make_case(device, varies=varies).cut(slice(num_seqs), slice(None))

    expected, expected_state = apply(experts, case)

    outputs, state = [], None

    with torch.inference_mode():
        for s in range(SEQ_LEN):
            step = case.cut(slice(None), slice(s, s + 1))
            output, state = apply(experts, step, state)

            outputs.append(output)

    assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-10)
    assert_close(state, expected_state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seq_lens", LENS)
def test_a_step_after_a_long_text_equals_the_whole(
    seq_lens: list[int] | None, device: torch.device
) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case, last = make_case(device, seq_lens), make_case(device, seq_len=1)

    with torch.inference_mode():
        _, state = apply(experts, case)
        output, _ = apply(experts, last, state)

    for n in range(case.seqs.size(0)):
        end = SEQ_LEN if seq_lens is None else seq_lens[n]

        begin, step = case.cut(slice(n, n + 1), slice(end)), slice(n, n + 1)
        whole = Case(
            torch.cat([begin.seqs, last.seqs[step]], dim=1),
            torch.cat([begin.indices, last.indices[step]], dim=1),
            torch.cat([begin.weights, last.weights[step]], dim=1),
            None,
        )
        expected, _ = apply(experts, whole)

        assert_close(output[n], expected[0, -1:], rtol=1e-9, atol=1e-10)


def test_a_step_leaves_the_state_before_it_as_it_was(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)

    with torch.inference_mode():
        _, state = apply(experts, make_case(device))
        assert state is not None
        tensors = [x for bank in state for x in (bank or ())]
        copies = [x.clone() for x in tensors]

        apply(experts, make_case(device, seq_len=1), state)

    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


class CountingBank(Module):
    """Experts that return their weight, and tell which of them were asked."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()

        self.weight = Parameter(torch.arange(1.0, 1 + num_experts))
        self.asked: list[float] = []

    @override
    def forward(
        self, seqs: Tensor, seq_lens: Tensor | None, state: Any, *, return_state: bool
    ) -> tuple[Tensor, None]:
        self.asked += self.weight.tolist()

        return self.weight.view(-1, 1, 1, 1).expand(*seqs.shape), None


def test_a_step_asks_the_chosen_experts_only(device: torch.device) -> None:
    mlstm, slstm = CountingBank(4).to(device), CountingBank(4).to(device)
    experts = SparseExperts(8, mlstm=mlstm, slstm=slstm, expert_state="token")

    # Experts 1 and 3 are of the first bank, 6 is the third of the second.
    case = Case(
        torch.zeros(2, 1, 5, device=device),
        tensor([[[1, 6]], [[6, 3]]], device=device),
        tensor([[[0.5, 0.5]], [[0.25, 0.75]]], device=device),
        None,
    )

    with torch.inference_mode():
        output, _ = apply(experts, case)

    assert (mlstm.asked, slstm.asked) == ([2.0, 4.0], [3.0])
    # 0.5 * 2 + 0.5 * 3 and 0.25 * 3 + 0.75 * 4
    assert output[:, 0, 0].tolist() == [2.5, 3.75]


def test_training_computes_all_experts(device: torch.device) -> None:
    experts = make_experts("subsequence", (2, 3, 0), device)
    case = make_case(device, seq_len=1).cut(slice(1), slice(None))

    output, _ = apply(experts, case)
    torch.autograd.backward(output.sum())

    assert output.dtype == float64
    for param in experts.parameters():
        assert param.grad is not None
