"""Compile kernels for an H100, which takes no GPU.

Triton's interpreter checks no types, no least sizes of products and no shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

SHARED_BYTES: Final = 232_448
"""What a program may have of shared memory on an H100 (227 KiB)."""

SHARED_BYTES_OF_TWO: Final = SHARED_BYTES // 2 - 512
"""What each of two programs may have (113 KiB) on one multiprocessor, whose 228 KiB
have 1 KiB more for each program, the system's."""

_MOVES: Final = re.compile(r"^ {6,}%.* ttg\.convert_layout ", re.MULTILINE)

_ROOT: Final = Path(__file__).parents[3]


class Launch(NamedTuple):
    """What a launch has been compiled to."""

    kernel: str
    """The name of the kernel."""

    shared: int
    """Bytes of shared memory."""

    num_barriers: int
    """Of all threads of a program, as Triton was asked for."""

    reads_incoherently: bool
    """Whether a read may miss what other threads of the program wrote."""

    multiplies_in_groups: bool
    """Whether four warps multiply together, as an H100 does fastest."""

    num_moves: int
    """How often a step of a loop moves a tile from thread to thread."""


def compile_launches(launch: Callable[[], None], cache: Path) -> list[Launch]:
    """Compile what a function would launch.

    It is called in a fresh interpreter, as kernels are interpreted in that of tests.
    There the launchers run as they are, but each launch only compiles.

    :param launch: A function of a module; it launches kernels on a CPU's tensors.
    :param cache: An empty directory.

    :returns: What was compiled, launch by launch.
    """
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run(
        [sys.executable, "-m", __name__, launch.__module__, launch.__name__],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    return [Launch(*x) for x in json.loads(run.stdout)]


def _compile_only() -> list[Launch]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from moxe_plugin.nn.triton.launching import Launcher

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    run, launches = JITFunction.run, []

    def compile_only(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> Any:
        assert not warmup
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        assert compiled.asm["cubin"]
        launches.append(
            Launch(
                self.fn.__name__,
                compiled.metadata.shared,
                compiled.asm["ttgir"].count("gpu.barrier"),
                "ld.global.nc" in compiled.asm["ptx"],
                "wgmma" in compiled.asm["ptx"],
                # What is in a loop is indented more than the kernel's own lines.
                len(_MOVES.findall(compiled.asm["ttgir"])),
            )
        )

        return compiled

    def launch(
        self: Launcher, grid: tuple[int, ...], *args: Any, **constants: Any
    ) -> None:
        # A second launch would not ask Triton, but run what it had compiled.
        self.kernel[grid](*args, **constants)

    JITFunction.run = compile_only
    Launcher._launch = launch  # type: ignore[method-assign]  # in this process only

    return launches


if __name__ == "__main__":
    compiled = _compile_only()
    getattr(import_module(sys.argv[1]), sys.argv[2])()
    sys.stdout.write(json.dumps(compiled))
