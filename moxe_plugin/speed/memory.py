"""The largest amount of memory that was in use, on the CPU and on accelerators."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")

_RESET_PEAK: Final = "5"
"""See proc(5)."""

_SLACK_BYTES: Final = 64 * 2**20
"""What may have been allocated between the reset of a peak and its reading."""


def release_memory(device: torch.device) -> None:
    """Give unused memory back, so that one row does not show in the peak of the next.

    :param device: What is computed on.
    """
    gc.collect()

    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        # fairseq2n exists for glibc only.
        ctypes.CDLL(None).malloc_trim(0)


def read_memory(device: torch.device) -> int | None:
    """Read how much memory is in use.

    :param device: ``cpu`` means the resident memory of the process.

    :returns: Bytes; ``None`` if the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)

    return _read_status("VmRSS")


def reset_peak_memory(device: torch.device) -> bool:
    """Begin to look for the largest amount of memory in use.

    :param device: As for :func:`read_memory`.

    :returns: Whether it worked; if not, :func:`read_peak_memory` would return the peak
        of something earlier.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        return True

    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False

    # Some containers accept the order and do nothing.
    peak, resident = _read_status("VmHWM"), _read_status("VmRSS")

    return peak is not None and resident is not None and peak - resident < _SLACK_BYTES


def read_peak_memory(device: torch.device) -> int | None:
    """Read the largest amount of memory in use since :func:`reset_peak_memory`.

    :param device: As for :func:`read_memory`.

    :returns: Bytes; ``None`` if the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    return _read_status("VmHWM")


def _read_status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None

    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

    return None
