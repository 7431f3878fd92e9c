"""Compile the Triton kernels for an H100, which takes no GPU.

The interpreter checks no types, no least sizes of products and no shared memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, cast

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 232_448
"""What a block may have of shared memory on an H100 (227 KiB)."""

# In a fresh interpreter, as in this one kernels are interpreted. The launchers run as
# they are, on a CPU's tensors, but each launch only compiles. Of Table 1 the widths of
# MoxE: those of the xLSTM have the same tiles, or smaller ones (D = 128 for 160).
COMPILE = """
import json
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moxe_plugin.speed.kernel_calls import prepare_kernel_calls
from moxe_plugin.speed.kernel_cases import list_kernel_cases

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
    found.append(
        {
            "kernel": case.kernel,
            "shared": compiled.metadata.shared,
            "has_cubin": bool(compiled.asm["cubin"]),
            "num_barriers": compiled.asm["ttgir"].count("gpu.barrier"),
            "reads_incoherently": "ld.global.nc" in compiled.asm["ptx"],
        }
    )

JITFunction.run = compile_only
for case in list_kernel_cases(batch=1, length=64):
    # The mLSTM's down-projection has the tiles of its up-projection.
    if case.system == "moxe" and case.phase == "train" and case.dim != 1280:
        for dtype in (torch.float32, torch.bfloat16):
            prepare_kernel_calls(case, dtype, torch.device("cpu"), seed=1).kernel()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Tell what each launch has been compiled to."""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    return cast(list[dict[str, Any]], json.loads(run.stdout))


# In float32 and bfloat16
@pytest.mark.parametrize(
    ("kernel", "num_launches"), [("mlstm", 10), ("slstm", 4), ("grouped", 6)]
)
def test_kernels_compile_and_fit(
    kernel: str, num_launches: int, launches: list[dict[str, Any]]
) -> None:
    launches = [x for x in launches if x["kernel"] == kernel]

    assert len(launches) == num_launches
    for launch in launches:
        assert launch["has_cubin"]
        assert launch["shared"] <= SHARED_BYTES, launch


def test_threads_of_the_slstm_see_what_others_wrote(
    launches: list[dict[str, Any]],
) -> None:
    """Look for what the docstring of `slstm_kernels` relies on."""
    launches = [x for x in launches if x["kernel"] == "slstm"]

    assert not any(x["reads_incoherently"] for x in launches)
    assert [x["num_barriers"] for x in launches] == [2, 1, 2, 1]
