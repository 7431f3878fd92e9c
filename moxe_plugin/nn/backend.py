"""Choose what computes the sLSTM's loop over time; with ``triton``, whole blocks too.

``torch`` is the reference and runs everywhere. ``native`` is C++ for CPUs, which is
compiled when it is first needed. ``triton`` is kernels for GPUs, in float32 or less.
``auto`` takes ``native`` for plain tensors on a CPU if a C++ compiler is there,
``triton`` for those on a GPU of NVIDIA's with the shared memory of an H100 if Triton is
there, else ``torch``; on a CPU it logs once which of the two, and why. All compute the
same function, in float32; but ``triton`` multiplies R of 16 bits as it is, and rounds
the outputs to its type, where
:func:`~moxe_plugin.nn.triton.slstm_scan.runs_on_chip`.

The difficulty router follows the same choice. The blocks' causal convolution runs in
C++ where :func:`convolves_natively` says so.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import (
    NativeLibraryError,
    is_readable,
    why_not_loaded,
)
from moxe_plugin.nn.products import follows_autocast

ScanBackend: TypeAlias = Literal["auto", "torch", "native", "triton"]

SCAN_BACKENDS: Final = ("auto", "torch", "native", "triton")

_log: Final = logging.getLogger(__name__)


class TritonMissingError(RuntimeError):
    """Triton is not installed here."""


def resolve_backend(
    backend: ScanBackend, seqs: Tensor
) -> Literal["torch", "native", "triton"]:
    """Tell which implementation runs.

    :param backend: The choice.
    :param seqs: Any tensor that the cell is going to read.

    :returns: The implementation.

    :raises ValueError: ``backend`` is unknown, or ``native`` for a tensor that is not
        on a CPU or has no memory (DTensor, FakeTensor …), or ``triton`` for one that is
        on no GPU (unless Triton interprets its kernels, as the environment variable
        ``TRITON_INTERPRET`` asks for: for tests) or is float64.
    :raises NativeLibraryError: ``backend`` is ``native``, and cannot be compiled.
    :raises TritonMissingError: ``backend`` is ``triton``, which is not installed.
    """
    check_backend(backend)

    if backend == "auto":
        if seqs.device.type == "cpu":
            return _choose_for_cpu() if is_readable(seqs) else "torch"

        # The meta device computes nothing.
        if runs_triton(seqs) and has_shared_memory(seqs.device):
            return "triton"

        return "torch"

    if backend == "torch":
        return "torch"

    if backend == "triton":
        _check_triton(seqs)

        return "triton"

    if seqs.device.type != "cpu":
        raise ValueError(
            "`backend` must be 'auto' or 'torch' for tensors that are not on a CPU, "
            f"but is 'native' with a tensor on '{seqs.device}'."
        )

    if not is_readable(seqs):
        raise ValueError(
            "`backend` must be 'auto' or 'torch' for tensors that C++ cannot read, but "
            f"is 'native' with a {type(seqs).__name__}."
        )

    if reason := why_not_loaded("slstm_scan"):
        raise NativeLibraryError(
            f"`backend` must be 'auto' or 'torch' on this machine, but is 'native': "
            f"{reason}."
        )

    return "native"


def check_backend(backend: str) -> None:
    """Look for a backend that does not exist.

    :param backend: The choice.

    :raises ValueError: There is none of this name.
    """
    if backend not in SCAN_BACKENDS:
        raise ValueError(
            f"`backend` must be one of {', '.join(SCAN_BACKENDS)}, but is '{backend}' "
            "instead."
        )


def convolves_natively(backend: ScanBackend, *tensors: Tensor) -> bool:
    """Tell whether the causal convolution of some tensors runs in C++.

    It does with ``auto`` and ``native``, for plain tensors on a CPU that are all of one
    type (16 bits are computed in 32), not compiled, and under no autocast but one that
    products in C++ follow. ``auto`` also needs a C++ compiler. Everything else is
    torch's.

    :param backend: The choice.
    :param tensors: What the convolution reads.

    :returns: Whether it does.

    :raises ValueError: ``backend`` is unknown.
    :raises NativeLibraryError: ``backend`` is ``native``, and cannot be compiled.
    """
    check_backend(backend)

    dtype = tensors[0].dtype

    if (
        backend not in ("auto", "native")
        or any(x.dtype != dtype or not is_readable(x) for x in tensors)
        or not follows_autocast()
        or torch.compiler.is_compiling()
    ):
        return False

    reason = _why_convolution_is_torchs()

    if reason is not None and backend == "native":
        raise NativeLibraryError(
            f"`backend` must be 'auto' or 'torch' on this machine, but is 'native': "
            f"{reason}."
        )

    return reason is None


MAX_ROWS_LEN: Final = 4096
"""The longest sequence that :func:`trains_on_rows`: there the mLSTM takes its parallel
form, whose work grows with the square of the length."""

MIN_SHARED_MEMORY: Final = 227 * 1024
"""Bytes of shared memory that a program gets on an H100, which the kernels of whole
blocks are cut for."""


MAX_STEP_SEQS: Final = 64
"""The most sequences whose tokens, one of each, are read by kernels for few tokens:
they read weights anew for each."""


def trains_on_rows(backend: ScanBackend, seqs: Tensor) -> bool:
    """Tell whether whole blocks may run as Triton kernels on ragged rows.

    They may where a block keeps no state, hence in training, with ``triton`` (and
    ``auto``, where that takes it), if products are of bfloat16 or float16 and the GPU
    has ``MIN_SHARED_MEMORY``.

    :param backend: The choice.
    :param seqs: What a block reads. *Shape:* ``(N,S,M)``.

    :returns: Whether they may.

    :raises ValueError: As :func:`resolve_backend`.
    :raises TritonMissingError: As :func:`resolve_backend`.
    """
    return (
        product_dtype(seqs) in (torch.bfloat16, torch.float16)
        and type(seqs) in (Tensor, torch.nn.Parameter)
        and seqs.size(-2) <= MAX_ROWS_LEN
        and not torch.compiler.is_compiling()
        and resolve_backend(backend, seqs) == "triton"
        and has_shared_memory(seqs.device)
    )


def product_dtype(seqs: Tensor) -> torch.dtype:
    """Tell in which type a block's products are, unless they are C++, which rounds.

    :param seqs: What the block reads.

    :returns: That of autocast, or else of ``seqs``.
    """
    device_type = seqs.device.type

    if torch.is_autocast_enabled(device_type) and seqs.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)

    return seqs.dtype


def runs_triton(seqs: Tensor) -> bool:
    """Tell whether Triton compiles kernels for a tensor.

    It does on GPUs of NVIDIA's where it is installed, in all types but float64, outside
    of compiled code.

    :param seqs: What a kernel reads.

    :returns: Whether it does.
    """
    return (
        seqs.is_cuda
        and torch.version.hip is None
        and seqs.dtype != torch.float64
        and not torch.compiler.is_compiling()
        and _has_triton()
    )


def _check_triton(seqs: Tensor) -> None:
    if not _has_triton():
        raise TritonMissingError(
            "`backend` must be 'auto' or 'torch' on this machine, but is 'triton': "
            "there is no package triton (torch for Linux brings it)."
        )

    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    if seqs.device.type != "cuda" and not (is_interpreted and seqs.is_cpu):
        raise ValueError(
            "`backend` must be 'auto', 'torch' or 'native' for tensors that are on no "
            f"GPU, but is 'triton' with a tensor on '{seqs.device}'."
        )

    if seqs.dtype == torch.float64:
        raise ValueError(
            "`backend` must be 'auto', 'torch' or 'native' for float64, but is "
            "'triton'."
        )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def has_shared_memory(device: torch.device) -> bool:
    """Tell whether a program gets ``MIN_SHARED_MEMORY``.

    :param device: Where kernels run.

    :returns: Whether it does. Triton's interpreter, on a CPU, has no limit.
    """
    if device.type != "cuda":
        return True

    properties = torch.cuda.get_device_properties(device)
    size: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it

    return size >= MIN_SHARED_MEMORY


@cache
def _choose_for_cpu() -> Literal["torch", "native"]:
    reason = why_not_loaded("slstm_scan")

    if reason is None:
        _log.info("The sLSTM cell runs in C++.")

        return "native"

    _log.warning("The sLSTM cell runs as a loop in Python, which is slow: %s.", reason)

    return "torch"


@cache
def _why_convolution_is_torchs() -> str | None:
    reason = why_not_loaded("causal_conv")

    if reason is None:
        _log.info("The causal convolution runs in C++.")
    else:
        _log.warning("The causal convolution is torch's, which is slow: %s.", reason)

    return reason
