"""Experts and batches for the tests of experts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.nn import Module

from moxe_plugin.nn.expert_layouts import ExpertStateKind
from moxe_plugin.nn.expert_states import ExpertsState
from moxe_plugin.nn.experts import ExpertSteps, SparseExperts
from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.selection import NO_EXPERT
from moxe_plugin.nn.slstm import SLSTMBlock

MODEL_DIM, NUM_EXPERTS, TOP_K, NUM_SEQS, SEQ_LEN = 6, 5, 2, 3, 11

EXPERT_STATES: list[ExpertStateKind] = ["subsequence", "token", "dense"]

RECURRENT: list[ExpertStateKind] = ["subsequence", "dense"]

# Numbers of mLSTM, sLSTM and feed-forward experts.
SPLITS = [
    pytest.param((2, 3, 0), id="both"),
    pytest.param((5, 0, 0), id="mlstm"),
    pytest.param((0, 5, 0), id="slstm"),
    pytest.param((0, 0, 5), id="ffn"),
]

Split = tuple[int, int, int]

# Whether tokens differ in their number of experts
VARIES = pytest.mark.parametrize("varies", [False, True], ids=["fixed", "varying"])

LENS = [
    pytest.param(None, id="full"),
    pytest.param([11, 0, 7], id="padded"),
]


def create_bank(kind: str, num_experts: int | None) -> Module:
    if kind == "mlstm":
        return MLSTMBlock(
            MODEL_DIM, num_heads=2, qkv_block_size=8, num_experts=num_experts
        )

    if kind == "slstm":
        return SLSTMBlock(MODEL_DIM, num_heads=2, num_experts=num_experts)

    return GatedFeedForward(
        MODEL_DIM, 9, up_std=0.5, down_std=0.5, num_experts=num_experts
    )


def make_experts(
    expert_state: ExpertStateKind,
    split: Split,
    device: torch.device,
    steps: ExpertSteps = "auto",
) -> SparseExperts:
    banks = {
        kind: create_bank(kind, size)
        for kind, size in zip(("mlstm", "slstm", "ffn"), split, strict=True)
        if size
    }

    experts = SparseExperts(sum(split), **banks, expert_state=expert_state, steps=steps)
    experts.to(device, float64)

    with torch.no_grad():
        for param in experts.parameters():
            param.add_(torch.randn_like(param), alpha=0.3)

    return experts


class Case(NamedTuple):
    seqs: Tensor
    indices: Tensor
    weights: Tensor
    seq_lens: Tensor | None

    def cut(self, seqs: slice, tokens: slice) -> Case:
        return Case(
            self.seqs[seqs, tokens],
            self.indices[seqs, tokens],
            self.weights[seqs, tokens],
            None,
        )

    @property
    def routing(self) -> Routing:
        unused = torch.empty(0)

        return Routing(
            unused,
            unused,
            unused,
            unused,
            None,
            self.indices.flatten(0, 1),
            self.weights.flatten(0, 1),
        )


def make_case(
    device: torch.device,
    seq_lens: list[int] | None = None,
    seq_len: int = SEQ_LEN,
    *,
    varies: bool = False,
) -> Case:
    shape = (NUM_SEQS, seq_len)

    max_top_k = 4 if varies else TOP_K

    # Expert 1 gets no token at all.
    scores = torch.rand(*shape, NUM_EXPERTS, device=device)
    scores[..., 1] = -1.0

    indices = scores.topk(max_top_k, dim=-1).indices
    weights = torch.rand(*shape, max_top_k, dtype=float64, device=device)

    if varies:
        num_chosen = torch.randint(1, max_top_k + 1, (*shape, 1), device=device)
        is_empty = torch.arange(max_top_k, device=device) >= num_chosen

        # The weights of empty places are not 0 here: none may count.
        indices = indices.masked_fill(is_empty, NO_EXPERT)

    return Case(
        torch.randn(*shape, MODEL_DIM, dtype=float64, device=device),
        indices,
        weights,
        None if seq_lens is None else tensor(seq_lens, device=device),
    )


def apply(
    experts: SparseExperts,
    case: Case,
    state: ExpertsState | None = None,
    *,
    reuse_state: bool = False,
) -> tuple[Tensor, ExpertsState | None]:
    output: tuple[Tensor, ExpertsState | None] = experts(
        case.seqs, case.routing, case.seq_lens, state, reuse_state=reuse_state
    )

    return output
