"""Compile the Triton kernels for an H100, which takes no GPU.

The interpreter checks no types, no least sizes of products and no shared memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 232_448
"""What a block may have of shared memory on an H100 (227 KiB)."""

# A fresh interpreter, as in this one kernels are interpreted. D of Table 1.
COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moxe_plugin.nn.triton import mlstm_backward, mlstm_forward

dtype, block_dim = sys.argv[1], int(sys.argv[2])
kernels = [
    mlstm_forward.state_kernel, mlstm_forward.output_kernel,
    mlstm_backward.state_grad_kernel, mlstm_backward.query_key_grad_kernel,
    mlstm_backward.value_grad_kernel,
]
in_dtype = {"q", "k", "v", "h", "c"}
in_dtype |= {"grad_" + x for x in in_dtype}
sizes = {"D": 320, "L": 64, "BLOCK_L": 64, "BLOCK_D": block_dim, "WIDE": False}
sizes["HAS_MEMORY"] = True
shared = {}
for kernel in kernels:
    types = {}
    for name in kernel.arg_names:
        if name in sizes:
            types[name] = "constexpr"
        elif name == "lens_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*" + (dtype if name[:-4] in in_dtype else "fp32")
        else:
            types[name] = "fp32" if name in ("scale", "eps") else "i32"
    constants = {x: sizes[x] for x in kernel.arg_names if x in sizes}
    compiled = compile(
        ASTSource(kernel, types, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8},
    )
    assert compiled.asm["cubin"]
    shared[kernel.__name__] = compiled.metadata.shared
print(json.dumps(shared))
"""


@pytest.mark.parametrize(("dtype", "block_dim"), [("bf16", 64), ("fp32", 32)])
def test_mlstm_kernels_compile_and_fit(
    dtype: str, block_dim: int, tmp_path: Path
) -> None:
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype, str(block_dim)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shared = json.loads(run.stdout)
    assert len(shared) == 5
    assert max(shared.values()) <= SHARED_BYTES, shared
