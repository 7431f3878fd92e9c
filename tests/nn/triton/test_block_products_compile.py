"""Compile the kernels of `moxe_plugin.nn.triton.block_products` for an H100.

It takes no GPU: see `test_compile`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 233_472
"""What a multiprocessor of an H100 has of shared memory (228 KiB)."""

# The sizes of Table 1
COMPILE = """
import json
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moxe_plugin.nn.ragged import ragged_rows
from moxe_plugin.nn.triton.block_products import (
    CellWeights, project_backward, project_forward
)

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
    found.append([len(compiled.asm["cubin"]), compiled.metadata.shared])

JITFunction.run = compile_only
rows = ragged_rows([[64], [0], [60], [4]], torch.device("cpu"))
for dtype in (torch.float32, torch.bfloat16):
    u, a, grads, gate_grads = (torch.zeros(128, x) for x in (1280, 2560, 3840, 8))
    blocks = [torch.zeros(4, 40, 32, 32, dtype=dtype)] * 3
    gates = [torch.zeros(4, 3840, 4, dtype=dtype)] * 2
    weights = CellWeights(*blocks, *gates, *[torch.zeros(4, 4, dtype=dtype)] * 2)
    u, a, grads = u.to(dtype), a.to(dtype)[:, :1280], grads.to(dtype)
    project_forward(u, a, weights, rows)
    project_backward(grads, gate_grads, u, a, weights, rows, u, a)
print(json.dumps(found))
"""


def test_kernels_compile_and_two_programs_fit(tmp_path: Path) -> None:
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    launches = json.loads(run.stdout)
    # Forward, backward and sums, in each type
    assert len(launches) == 6
    for num_bytes, shared in launches:
        assert num_bytes > 0
        # Of each program 1 KiB is the system's.
        assert 2 * (shared + 1024) <= SHARED_BYTES
