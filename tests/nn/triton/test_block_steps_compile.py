"""Compile the kernels of `moxe_plugin.nn.triton.block_steps`: see `compiling`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.slstm import SLSTMBlock
from tests.nn.triton.compiling import compile_launches

pytest.importorskip("triton")


def launch_kernels() -> None:
    """Launch them at the sizes of Table 1."""
    from moxe_plugin.nn.triton.block_steps import sum_experts
    from moxe_plugin.nn.triton.router_scores import score_tokens
    from moxe_plugin.nn.triton.step_units import StepUnits

    tokens = torch.zeros(2, 640, dtype=torch.bfloat16)
    experts = torch.tensor([0, 5, 3, 7])
    out = torch.zeros(4, 640)
    mlstm = MLSTMBlock(640, num_heads=4, num_experts=4).bfloat16()
    slstm = SLSTMBlock(640, num_heads=4, num_experts=4).bfloat16()

    with torch.no_grad():
        units = StepUnits(tokens, experts, 0, 4, 2)
        mlstm.step_units(units, mlstm.initial_state(2), out)
        units = StepUnits(tokens, experts, 4, 4, 2)
        slstm.step_units(units, slstm.initial_state(2), out)

        sum_experts(out, torch.zeros(2, 2), experts, 8, tokens)

    weight = torch.zeros(8, 640, dtype=torch.bfloat16)
    score_tokens(tokens.float(), weight, None, weight[0], weight[0, :1])


def test_kernels_compile_and_see_what_was_written(tmp_path: Path) -> None:
    launches = compile_launches(launch_kernels, tmp_path)

    # Five for the mLSTM, four for the sLSTM, the sum, and the router's scores
    assert len(launches) == 11
    assert not any(x.reads_incoherently for x in launches)

    # Barriers that Triton was asked for, where a kernel writes what it has read
    barriers = {x.kernel: x.num_barriers for x in launches}
    for kernel in (
        *("mlstm_step_inputs_kernel", "mlstm_step_output_kernel"),
        *("slstm_step_cell_kernel", "slstm_step_norm_kernel"),
    ):
        assert barriers[kernel] >= 1
