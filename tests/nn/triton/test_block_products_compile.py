"""Compile the kernels of `moxe_plugin.nn.triton.block_products`: see `compiling`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moxe_plugin.nn.ragged import ragged_rows
from tests.nn.triton.compiling import SHARED_BYTES_OF_TWO, compile_launches

pytest.importorskip("triton")


def launch_kernels() -> None:
    """Launch them at the sizes of Table 1."""
    from moxe_plugin.nn.triton.block_products import (
        CellWeights,
        project_backward,
        project_forward,
    )
    from moxe_plugin.nn.triton.partials import PartialSums

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    rows = ragged_rows([[64], [0], [60], [4]], torch.device("cpu"))
    blocks, gates, bias = zeros(4, 40, 32, 32), zeros(4, 3840, 4), zeros(4, 4)
    weights = CellWeights(blocks, blocks, blocks, gates, gates, bias, bias)
    u, a = zeros(128, 1280), zeros(128, 2560)[:, :1280]

    project_forward(u, a, weights, rows)
    sums = PartialSums(rows)
    project_backward(
        zeros(128, 3840), torch.zeros(128, 8), u, a, weights, rows, sums, u, a
    )
    sums.add_up()


def test_kernels_compile_and_two_programs_fit(tmp_path: Path) -> None:
    launches = compile_launches(launch_kernels, tmp_path)

    # Forward, backward and sums
    assert len(launches) == 3
    assert max(x.shared for x in launches) <= SHARED_BYTES_OF_TWO
