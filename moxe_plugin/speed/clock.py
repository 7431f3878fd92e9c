"""Seconds of a call, and how fast the machine multiplies and copies."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_PEAK_REPEATS: Final = 9
_PEAK_WARM_UP: Final = 2


def time_repeats(
    call: Callable[[], object], repeats: int, device: torch.device
) -> list[float]:
    """Time a call again and again.

    Python looks for no garbage meanwhile, as it does not in fairseq2's trainer but once
    in ``gc_every_n_steps``: that would count what the process did before.

    :param call: What is timed; it is not warmed up.
    :param repeats: How often.
    :param device: What it computes on; CUDA's own events tell the time there.

    :returns: Seconds of each call.
    """
    timer = _time_on_cuda if device.type == "cuda" else _time_on_cpu

    is_enabled = gc.isenabled()
    gc.disable()

    try:
        return [timer(call) for _ in range(repeats)]
    finally:
        if is_enabled:
            gc.enable()


def _time_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()

    return time.perf_counter() - begin


def _time_on_cuda(call: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    torch.cuda.synchronize()

    begin.record()
    call()
    end.record()

    torch.cuda.synchronize()

    return float(begin.elapsed_time(end)) / 1e3


def measure_matmul(
    dtype: torch.dtype,
    size: int,
    device: torch.device,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> float:
    """Measure the product of two square matrices.

    :param dtype: The data type of the matrices.
    :param size: Their number of rows.
    :param device: Where they are.
    :param product: Multiplies them.

    :returns: GFLOP/s, the median.
    """
    lhs = torch.randn(size, size, device=device).to(dtype)
    rhs = torch.randn(size, size, device=device).to(dtype)

    with torch.no_grad():
        seconds = _median(lambda: product(lhs, rhs), device)

    return 2 * size**3 / seconds / 1e9


def measure_copy(size: int, device: torch.device) -> float:
    """Measure a copy from memory to memory.

    :param size: The bytes that are read, and as many are written: many more than the
        caches hold.
    :param device: Where they are.

    :returns: GB/s (``1e9`` bytes), read and written, the median.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    return 2 * size / _median(lambda: target.copy_(source), device) / 1e9


def measure_new_memory(size: int, device: torch.device) -> float:
    """Measure how fast memory is filled that the allocator has just handed out.

    glibc takes large pieces from the system and gives them back when they are freed, so
    that each page is found and cleared anew; an allocator that keeps them is faster.

    :param size: The bytes that are written.
    :param device: Where they are.

    :returns: GB/s (``1e9`` bytes), written, the median.
    """

    def call() -> None:
        torch.empty(size, dtype=torch.uint8, device=device).fill_(1)

    return size / _median(call, device) / 1e9


def _median(call: Callable[[], object], device: torch.device) -> float:
    time_repeats(call, _PEAK_WARM_UP, device)

    return statistics.median(time_repeats(call, _PEAK_REPEATS, device))
