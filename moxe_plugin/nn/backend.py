"""Choose what computes the sLSTM's loop over time.

``torch`` is the reference and runs everywhere. ``native`` is C++ for CPUs, which is
compiled when it is first needed. ``auto`` takes ``native`` for tensors on a CPU if a
C++ compiler is there, else ``torch``, and logs once which of the two and why; both
compute the same function.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Final, Literal, TypeAlias

from torch import Tensor

from moxe_plugin.nn.native.library import NativeLibraryError, why_not_loaded

ScanBackend: TypeAlias = Literal["auto", "torch", "native"]

SCAN_BACKENDS: Final = ("auto", "torch", "native")

_log: Final = logging.getLogger(__name__)


def resolve_backend(backend: ScanBackend, seqs: Tensor) -> Literal["torch", "native"]:
    """Tell which implementation runs.

    :param backend: The choice.
    :param seqs: Any tensor that the cell is going to read.

    :returns: The implementation.

    :raises ValueError: ``backend`` is unknown, or ``native`` for a tensor that is not
        on a CPU.
    :raises NativeLibraryError: ``backend`` is ``native``, and cannot be compiled.
    """
    if backend not in SCAN_BACKENDS:
        raise ValueError(
            f"`backend` must be one of {', '.join(SCAN_BACKENDS)}, but is '{backend}' "
            "instead."
        )

    if backend == "auto":
        # The meta device computes nothing.
        return _choose_for_cpu() if seqs.device.type == "cpu" else "torch"

    if backend == "torch":
        return "torch"

    if seqs.device.type != "cpu":
        raise ValueError(
            "`backend` must be 'auto' or 'torch' for tensors that are not on a CPU, "
            f"but is 'native' with a tensor on '{seqs.device}'."
        )

    if reason := why_not_loaded():
        raise NativeLibraryError(
            f"`backend` must be 'auto' or 'torch' on this machine, but is 'native': "
            f"{reason}."
        )

    return "native"


@cache
def _choose_for_cpu() -> Literal["torch", "native"]:
    reason = why_not_loaded()

    if reason is None:
        _log.info("The sLSTM cell runs in C++.")

        return "native"

    _log.warning("The sLSTM cell runs as a loop in Python, which is slow: %s.", reason)

    return "torch"
