"""What the processor is."""

from __future__ import annotations

from pathlib import Path


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
