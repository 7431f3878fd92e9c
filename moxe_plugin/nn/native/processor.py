"""What the processor is."""

from __future__ import annotations

from pathlib import Path

import torch


def multiplies_pairs() -> bool:
    """Tell whether the processor multiplies pairs of bfloat16.

    :returns: Whether it does, and ``ATEN_CPU_CAPABILITY`` does not forbid it.
    """
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
    )


def find_vendor() -> str | None:
    """Tell who made the processor.

    :returns: What it calls its maker (``GenuineIntel``, ``AuthenticAMD`` …); ``None``
        if Linux does not tell.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None

    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")),
        None,
    )
