"""Compile the kernels of `moxe_plugin.nn.triton.head_products` for an H100.

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
from moxe_plugin.nn.triton.head_products import (
    gate_products, gate_products_backward, gate_weight_grads
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
    found.append([compiled.metadata.shared, "wgmma" in compiled.asm["ptx"]])

JITFunction.run = compile_only
rows = ragged_rows([[64], [0], [60], [4]], torch.device("cpu"))
for dtype in (torch.float32, torch.bfloat16):
    inputs = torch.zeros(128, 640, dtype=dtype)
    grads = torch.zeros(2, 128, 1280, dtype=dtype)
    weight = torch.zeros(4, 4, 160, 4, 160, dtype=dtype)
    gate_products(inputs, inputs, weight, rows)
    gate_products_backward(grads, weight, rows)
    gate_weight_grads(inputs, inputs, inputs, grads, weight, rows)
print(json.dumps(found))
"""


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
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
    # The gates, the gradients of inputs and of weights, and sums, in each type
    assert len(launches) == 8
    for i, (shared, is_warp_group_product) in enumerate(launches):
        # Of each program 1 KiB is the system's. That of the weights is alone.
        assert (1 if i % 4 == 2 else 2) * (shared + 1024) <= SHARED_BYTES
        assert is_warp_group_product == (i in (4, 5, 6))
