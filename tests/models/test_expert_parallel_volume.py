"""The communication that `docs/expert_parallelism.md` tells of, computed anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moxe_plugin.models.moxe import MoxEConfig, create_moxe_model

_PAGE = Path(__file__).parents[2] / "docs" / "expert_parallelism.md"

_NUM_SEQS, _SEQ_LEN = 32, 256


@pytest.mark.parametrize(
    ("num_experts", "num_processes"), [(8, 4), (64, 32), (512, 256)]
)
def test_page_tells_the_communication_of_table_1(
    num_experts: int, num_processes: int
) -> None:
    config = MoxEConfig(num_experts=num_experts)

    with torch.device("meta"):
        model = create_moxe_model(config)

    num_parameters = sum(p.numel() for p in model.parameters())
    num_in_experts = sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n
    )

    share = (num_processes - 1) / num_processes

    # There and back, forward and backward, in bf16
    per_token = 4 * config.num_layers * config.top_k * config.model_dim * 2 * share

    lens = config.num_layers * num_experts * _NUM_SEQS * 8 * share

    # Each gradient travels twice around a ring, in float32.
    all_reduce = 2 * num_in_experts * 4 * share

    row = (
        f"| {num_experts} | {num_processes} | {num_parameters / 1e6:,.1f} "
        f"| {num_in_experts / 1e6:,.1f} | {num_in_experts / num_processes / 1e6:,.1f} "
        f"| {per_token / 1e3:,.1f} | {per_token * _NUM_SEQS * _SEQ_LEN / 1e6:,.0f} "
        f"| {lens / 1e3:,.1f} | {all_reduce / 1e6:,.0f} "
        f"| {all_reduce / per_token:,.0f} |"
    )

    assert row in _PAGE.read_text(encoding="utf-8").splitlines()
