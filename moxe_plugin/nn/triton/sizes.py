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


def split_head_dim(head_dim: int) -> tuple[int, int] | None:
    """Split a width into those of two tiles, which Triton has in powers of two only.

    :param head_dim: The width D of a head.

    :returns: Two powers of two from 16 on, the first the larger, or one and 0; nothing
        where D is no such sum.
    """
    body = 1 << (head_dim.bit_length() - 1)
    tail = head_dim - body

    if body < 16 or tail & (tail - 1) or 0 < tail < 16:
        return None

    return body, tail
