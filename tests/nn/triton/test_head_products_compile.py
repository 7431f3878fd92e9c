"""Compile the kernels of `moxe_plugin.nn.triton.head_products`: see `compiling`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moxe_plugin.nn.ragged import ragged_rows
from tests.nn.triton.compiling import (
    SHARED_BYTES,
    SHARED_BYTES_OF_TWO,
    compile_launches,
)

pytest.importorskip("triton")


def launch_kernels() -> None:
    """Launch them at the sizes of Table 1."""
    from moxe_plugin.nn.triton.head_products import (
        gate_products,
        gate_products_backward,
        gate_weight_grads,
    )
    from moxe_plugin.nn.triton.partials import PartialSums

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    rows = ragged_rows([[64], [0], [60], [4]], torch.device("cpu"))
    inputs, grads, weight = (
        zeros(128, 640),
        zeros(2, 128, 1280),
        zeros(4, 4, 160, 4, 160),
    )

    gate_products(inputs, inputs, weight, rows)
    gate_products_backward(grads, weight, rows)
    sums = PartialSums(rows)
    gate_weight_grads(inputs, inputs, inputs, grads, weight, rows, sums)
    sums.add_up()


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    launches = compile_launches(launch_kernels, tmp_path)

    # The gates, the gradients of inputs and of weights, and sums
    assert len(launches) == 4
    for i, launch in enumerate(launches):
        # That of the weights is alone.
        assert launch.shared <= (SHARED_BYTES if i == 2 else SHARED_BYTES_OF_TWO)
        assert launch.multiplies_in_groups == (i < 3)
