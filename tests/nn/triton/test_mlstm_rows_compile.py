"""Compile the kernels of `moxe_plugin.nn.triton.mlstm_rows`: see `compiling`."""

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
    """Launch all at the width of MoxE's heads in Table 1, and some at the largest."""
    from moxe_plugin.nn.triton.mlstm_rows import (
        MAX_HEAD_DIM,
        mlstm_rows_backward,
        mlstm_rows_forward,
    )

    for lens in ([100, 20], [200]):
        rows = ragged_rows([lens], torch.device("cpu"))
        gates = torch.zeros(sum(lens), 2)
        for width in (320, MAX_HEAD_DIM):
            qkv = torch.zeros(sum(lens), 3 * width, dtype=torch.bfloat16)
            q, k, v = qkv.split(width, dim=1)
            h, small = mlstm_rows_forward(q, k, v, gates, rows, 1)
            if width == 320:
                mlstm_rows_backward(q, k, v, gates, h, small, h, q, k, v, rows)


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    launches = compile_launches(launch_kernels, tmp_path)

    forward, grads = ["gate", "forward"], ["query_grad", "key_value_grad", "gate_grad"]
    names = [f"mlstm_rows_{x}_kernel" for x in (*forward, *grads, *forward)]
    assert [x.kernel for x in launches] == 2 * names
    assert max(x.shared for x in launches) <= SHARED_BYTES
    # Of short segments, two programs at a time are on a multiprocessor.
    assert max(x.shared for x in launches[:5]) <= SHARED_BYTES_OF_TWO
    for launch in launches:
        assert launch.multiplies_in_groups == ("gate" not in launch.kernel)
