"""Compile the kernels of `moxe_plugin.nn.triton.mlstm_rows` for an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 232_448
"""What a block may have of shared memory on an H100 (227 KiB)."""

# In a fresh interpreter, as in this one kernels are interpreted. Two programs of blocks
# of 80 kB each fit on a multiprocessor; widths are that of MoxE, and the largest.
COMPILE = """
import json
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moxe_plugin.nn.ragged import ragged_rows
from moxe_plugin.nn.triton.mlstm_rows import mlstm_rows_backward, mlstm_rows_forward

driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
)
run, found = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **options):
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    assert compiled.asm["cubin"]
    found.append(compiled.metadata.shared)

JITFunction.run = compile_only
rows = ragged_rows([[64, 20]], torch.device("cpu"))
for width in (320, 512):
    qkv = torch.zeros(84, 3 * width, dtype=torch.bfloat16)
    qkv = qkv.split(width, dim=1)
    gates = torch.zeros(84, 2)
    h, small = mlstm_rows_forward(*qkv, gates, rows, 1)
    mlstm_rows_backward(*qkv, gates, h, small, h, *qkv, rows)
print(json.dumps(found))
"""


def test_kernels_compile_and_fit() -> None:
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    completed = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr

    shared = json.loads(completed.stdout)
    # Two gate kernels and three others, at two widths
    assert len(shared) == 10
    assert max(shared) <= SHARED_BYTES
    assert max(shared[:5]) <= SHARED_BYTES // 2
