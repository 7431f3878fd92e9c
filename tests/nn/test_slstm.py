"""Tests of `moxe_plugin.nn.slstm`; more are in `test_blocks` and `test_oracles`."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.slstm import SLSTMBlock


def test_initial_values_are_the_intended_ones() -> None:
    block = SLSTMBlock(128, num_heads=4, num_experts=3, num_blocks=2)

    # Five standard errors of the smallest sample.
    assert block.gate_proj.std().item() == pytest.approx(
        (2 / (5 * 32)) ** 0.5, rel=0.03
    )
    assert not block.recurrent_weight.any()
    assert not block.gate_bias[..., [0, 2, 3], :].any()


@pytest.mark.parametrize(("block_idx", "power"), [(0, 0.3), (1, 0.95), (2, 1.6)])
def test_forget_bias_falls_over_the_channels(block_idx: int, power: float) -> None:
    block = SLSTMBlock(10, num_heads=2, block_idx=block_idx, num_blocks=3)

    expected = torch.tensor([5 - 12 * (j / 4) ** power for j in range(5)])
    assert_close(block.gate_bias[:, 1], expected.repeat(2, 1))


def test_initial_state_is_empty() -> None:
    state = SLSTMBlock(16, num_heads=4, num_experts=3).initial_state(5)

    assert state.conv.shape == (3, 5, 3, 16)
    assert state.c.shape == state.y.shape == (3, 5, 4, 4)
    assert not torch.cat([x.flatten() for x in (state.conv, state.c, state.y)]).any()
    assert (state.log_n == EMPTY).all()


def test_parameters_are_counted_as_in_the_authors_code() -> None:
    # SEMANTICS.md §5: an sLSTM expert at Table 1 size.
    block = SLSTMBlock(640, num_heads=4, ffn_proj_factor=1.7)

    assert sum(p.numel() for p in block.parameters()) == 2_915_840
