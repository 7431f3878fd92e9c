"""Sizes of grids and blocks: Triton's own functions for them take longer to call."""

from __future__ import annotations


def ceil_div(size: int, block: int) -> int:
    """Count blocks.

    :param size: What they cover.
    :param block: The size of a block.

    :returns: ``size / block``, rounded up.
    """
    return -(-size // block)


def power_of_two(size: int) -> int:
    """Find the size of a block of Triton.

    :param size: What it has to hold, at least 1.

    :returns: The next power of two.
    """
    return 1 << (size - 1).bit_length()
