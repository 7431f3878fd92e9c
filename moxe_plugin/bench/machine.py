"""Which machine, code and libraries a run used."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

from moxe_plugin.report.records import Code, Hardware

_PACKAGES: Final = (
    "fairseq2",
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "numpy",
)
"""Packages whose version may change a number."""


class Jobs(NamedTuple):
    """How runs share the machine."""

    num_jobs: int
    """How many run at a time."""

    num_threads: int
    """Threads of one operation of a run."""

    devices: Sequence[str | None] = (None,)
    """What ``CUDA_VISIBLE_DEVICES`` is for each run at a time; ``None`` leaves it."""


def list_accelerators() -> list[str]:
    """List the GPUs that this process may use, without a library of CUDA.

    :returns: What ``CUDA_VISIBLE_DEVICES`` names, or the numbers of all there are.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]

    names = [file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia*")]

    return sorted((name for name in names if name.isdecimal()), key=int)


def plan_jobs(num_jobs: int | None) -> Jobs:
    """Decide how runs share the machine.

    By default a core gets one run: operations on small models are too short to be
    shared by threads, and far slower so when other processes need a core. Where there
    are GPUs each gets one run at a time, and sees no other GPU.

    :param num_jobs: How many runs at a time, if the user says so.

    :returns: The decision; ``OMP_NUM_THREADS`` overrides its threads.
    """
    num_cores = len(os.sched_getaffinity(0))
    num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))

    gpus = list_accelerators()

    if num_jobs is None:
        num_jobs = len(gpus) or max(1, num_cores // max(1, num_threads))

    devices: list[str | None] = [None] * num_jobs
    if gpus:
        devices = [gpus[job % len(gpus)] for job in range(num_jobs)]

    return Jobs(num_jobs, num_threads or max(1, num_cores // num_jobs), devices)


def describe_hardware(
    device: str, device_name: str | None, num_threads: int, num_jobs: int
) -> Hardware:
    """Describe the machine.

    :param device: ``cpu`` or ``cuda``.
    :param device_name: The accelerator's own name, if there is one.
    :param num_threads: Threads of one operation.
    :param num_jobs: How many runs shared the machine.

    :returns: The description.
    """
    if device_name is None:
        name, model = f"cpu{num_threads}", _cpu_model()
    else:
        words = device_name.lower().replace("nvidia", "").split()
        name, model = "-".join(words) or device, device_name

    return Hardware(
        name=name,
        device=device,
        model=model,
        num_threads=num_threads,
        num_jobs=num_jobs,
    )


def describe_code() -> Code:
    """Describe the code of this package.

    :returns: Its version, and its commit if it is a git checkout.
    """
    # Not the current directory's repository, nor one around a virtual environment.
    package_dir = Path(__file__).resolve().parents[1]

    is_checkout = _git(package_dir, "ls-files", "--error-unmatch", "__init__.py")

    commit = _git(package_dir, "rev-parse", "HEAD") if is_checkout else None
    if commit is None:
        return Code(version=version("moxe-plugin"), commit=None, dirty=None)

    changes = _git(package_dir, "status", "--porcelain", "--", str(package_dir))

    return Code(version=version("moxe-plugin"), commit=commit[:12], dirty=bool(changes))


def list_versions() -> dict[str, str]:
    """List the versions of Python and of the packages that produce the numbers.

    :returns: Versions by name.
    """
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def _git(directory: Path, *args: str) -> str | None:
    command = ["git", "-C", str(directory), *args]

    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None

    return output.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []

    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()

    return platform.processor() or f"{platform.machine()}, {os.cpu_count()} cores"
