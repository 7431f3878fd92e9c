"""Tests of which models' steps can be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moxe_plugin.models import captured_steps
from moxe_plugin.models.captured_steps import CapturedStepsLM, capture_steps
from moxe_plugin.nn.experts import SparseExperts
from tests.models.captured_cases import create
from tests.models.families import create_model

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


@pytest.mark.parametrize(
    "selection", ["top_k", "dynamic", "global_workspace", "loss_free"]
)
@pytest.mark.parametrize(
    ("experts", "expert_state"),
    [("xlstm", "subsequence"), ("xlstm", "token"), ("ffn", "token")],
)
def test_a_step_asks_nothing_of_the_device(
    experts: str, expert_state: str, selection: str
) -> None:
    def change(config: Any) -> None:
        config.experts = experts
        config.expert_state = expert_state
        config.expert_selection = selection

    with FakeTensorMode():
        model, _, _ = create("moxe", torch.device("cpu"), change)
        seqs = torch.ones(2, 1, dtype=torch.int64)

        with torch.no_grad():
            state_bag = IncrementalStateBag(10)
            for _ in range(2):
                logits = model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

    assert isinstance(logits, FakeTensor)
    assert logits.shape[:2] == seqs.shape


def test_recurrent_models_on_a_gpu_are_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(config: Any) -> None:
        config.expert_state = "dense"

    model, dense = create_model("moxe"), create_model("moxe", change=change)

    assert capture_steps(model) is model

    monkeypatch.setattr(captured_steps, "_is_plain", lambda _: True)

    captured = capture_steps(model)
    assert isinstance(captured, CapturedStepsLM)
    assert captured.model is model

    gemma2 = create_model("gemma2")
    assert capture_steps(gemma2) is gemma2
    assert capture_steps(dense) is dense

    for module in model.modules():
        if isinstance(module, SparseExperts):
            module.steps = "host"
    assert capture_steps(model) is model
