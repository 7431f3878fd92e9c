"""Which machine, code and libraries a run used."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Final

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


def describe_hardware(
    device: str, device_name: str | None, num_threads: int
) -> Hardware:
    """Describe the machine.

    :param device: ``cpu`` or ``cuda``.
    :param device_name: The accelerator's own name, if there is one.
    :param num_threads: Threads of one operation.

    :returns: The description.
    """
    if device_name is None:
        name, model = f"cpu{num_threads}", _cpu_model()
    else:
        words = device_name.lower().replace("nvidia", "").split()
        name, model = "-".join(words) or device, device_name

    return Hardware(name=name, device=device, model=model, num_threads=num_threads)


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
