"""Compare a kernel with its reference in torch, and time both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from moxe_plugin.models.captured_step import capture_cuda_graph
from moxe_plugin.speed.clock import time_repeats
from moxe_plugin.speed.kernel_calls import prepare_kernel_calls
from moxe_plugin.speed.kernel_cases import KernelCase


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """A kernel and its reference, timed."""

    case: KernelCase
    """What was timed."""

    seconds: list[float]
    """Of each launch of the kernel from a CUDA graph: the GPU's time alone."""

    reference_seconds: list[float]
    """Of each launch of the reference from a CUDA graph."""

    call_seconds: list[float]
    """Of each call of the kernel from Python, in which the GPU may wait for the host.
    """

    reference_call_seconds: list[float]
    """Of each call of the reference from Python."""

    error: float
    """The largest distance of a result from the reference's, over the length of that.
    """

    gflop: float
    """See :meth:`KernelCase.count_gflop`."""

    gbytes: float
    """See :meth:`KernelCase.count_gbytes`."""

    matmul_fraction: float
    """GFLOP/s over those of a product of matrices."""

    copy_fraction: float
    """GB/s over those of a copy."""

    @property
    def ratio(self) -> float:
        """How many times faster than the reference the kernel is, both from graphs."""
        return statistics.median(self.reference_seconds) / statistics.median(
            self.seconds
        )

    @property
    def call_ratio(self) -> float:
        """The same of calls from Python."""
        return statistics.median(self.reference_call_seconds) / statistics.median(
            self.call_seconds
        )


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """How kernels are measured."""

    dtype: str
    """``bfloat16``, ``float16`` or ``float32``: the type of the inputs."""

    repeats: int
    """How many calls are timed."""

    warm_up: int
    """How many calls go before; the first one compiles."""

    matmul_gflop_per_s: float
    """What products of matrices reach."""

    copy_gb_per_s: float
    """What copies reach."""

    seed: int = 1
    """Seeds the inputs."""


def measure_kernel(
    case: KernelCase, options: KernelOptions, device: torch.device
) -> KernelRow:
    """Compare a kernel with its reference, and time both.

    :param case: The kernel and its shape.
    :param options: How to measure.
    :param device: Where to compute.

    :returns: What was measured.
    """
    dtype: torch.dtype = getattr(torch, options.dtype)
    calls = prepare_kernel_calls(case, dtype, device, options.seed)

    results = zip(calls.kernel(), calls.align(calls.reference()), strict=True)
    # Unlike Python's own, this maximum does not pass over NaN.
    error = torch.stack([_distance(x, y) for x, y in results]).max().item()

    times, call_times = [], []
    for call in (calls.kernel, calls.reference):
        time_repeats(call, options.warm_up, device)
        call_times.append(time_repeats(call, options.repeats, device))

        # Without CUDA, in tests, calls stand for launches.
        replay = capture_cuda_graph(call, device) if device.type == "cuda" else call
        time_repeats(replay, options.warm_up, device)
        times.append(time_repeats(replay, options.repeats, device))
        # Two graphs might not fit into memory.
        del replay

    seconds = statistics.median(times[0])
    gflop, gbytes = case.count_gflop(), case.count_gbytes(dtype.itemsize)

    return KernelRow(
        case=case,
        seconds=times[0],
        reference_seconds=times[1],
        call_seconds=call_times[0],
        reference_call_seconds=call_times[1],
        error=error,
        gflop=gflop,
        gbytes=gbytes,
        matmul_fraction=gflop / seconds / options.matmul_gflop_per_s,
        copy_fraction=gbytes / seconds / options.copy_gb_per_s,
    )


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    actual, expected = (x.detach().float().flatten() for x in (actual, expected))

    distance: Tensor = (actual - expected).norm() / expected.norm()

    return distance
