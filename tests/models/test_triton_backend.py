"""Tests of whole models with the backend `triton`, in float32."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch import float32
from torch.testing import assert_close

from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.slstm import SLSTMBlock
from tests.models.families import create_model, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

pytest.importorskip("triton")


@pytest.mark.parametrize("family", ["moxe", "xlstm"])
def test_model_in_triton_is_the_model_in_torch(family: str) -> None:
    def choose(config: Any) -> None:
        config.backend = "triton"

    model = create_model(family, change=choose, dtype=float32)
    parts = (MLSTMBlock, SLSTMBlock, DifficultyRouter)
    blocks = [x for x in model.modules() if isinstance(x, parts)]
    with torch.no_grad():
        for block in blocks:
            if isinstance(block, SLSTMBlock):
                block.recurrent_weight.normal_(std=0.2)
    assert {block.backend for block in blocks} == {"triton"}

    seqs, targets = random_ids(2, 7), random_ids(2, 7)

    def run(backend: Literal["torch", "triton"]) -> list[torch.Tensor]:
        for block in blocks:
            block.backend = backend
        loss = model(seqs, BatchLayout.of(seqs), targets)
        params = [p for p in model.parameters() if p.requires_grad]

        return [loss, *torch.autograd.grad(loss, params)]

    assert_close(run("triton"), run("torch"), rtol=1e-4, atol=1e-5)
