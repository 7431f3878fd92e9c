"""How the work of the kernels of :mod:`.mlstm_rows` is cut, as measured on an H200."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.sizes import power_of_two
from moxe_plugin.nn.triton.tile_products import find_precision, is_interpreted


class Tiling(NamedTuple):
    """How the work of a kernel is cut."""

    block_t: int
    """The queries of a block."""

    block_s: int
    """The keys of a block."""

    block_d: int
    """The width of a tile; a head has as many as it needs."""

    num_warps: int
    num_stages: int


HALF_TILINGS = {
    "forward": Tiling(64, 32, 64, 4, 2),
    "query_grad": Tiling(64, 32, 64, 4, 2),
    "key_value_grad": Tiling(32, 64, 64, 4, 2),
}
"""For bfloat16 and float16."""

SHORT_HALF_TILINGS = HALF_TILINGS | {
    "forward": Tiling(64, 64, 64, 4, 1),
    "query_grad": Tiling(64, 64, 64, 4, 1),
}
"""The same for segments of up to ``SHORT_LEN``, with few blocks of keys to a query: one
larger block is faster than two of which the second is asked for during the first."""

SHORT_LEN = 128
"""The longest segments that take ``SHORT_HALF_TILINGS``."""

FLOAT_TILINGS = {
    "forward": Tiling(32, 32, 32, 8, 1),
    "query_grad": Tiling(32, 32, 32, 8, 1),
    "key_value_grad": Tiling(32, 32, 32, 8, 1),
}
"""For float32, whose tiles take twice the space."""

TF32_TILINGS = {
    "forward": Tiling(32, 32, 64, 4, 1),
    "query_grad": Tiling(32, 32, 64, 4, 1),
    "key_value_grad": Tiling(32, 32, 64, 4, 1),
}
"""For float32 that tensor cores may round: other tiles would not fit in registers."""

_WIDE_HEAD_DIM = 320
"""Blocks of wider heads do not fit in the registers of fewer than 8 warps."""


def find_options(
    kernel: str, dtype: torch.dtype, head_dim: int, rows: RaggedRows
) -> tuple[int, dict[str, Any]]:
    """Choose how a launch is cut.

    :param kernel: ``forward``, ``query_grad`` or ``key_value_grad``.
    :param dtype: The type of q, k and v.
    :param head_dim: The width D of a head.
    :param rows: Where the rows are.

    :returns: The number of a program's own positions, and the launch's options.
    """
    is_short = rows.max_len <= SHORT_LEN

    return _cached_options(kernel, dtype, head_dim, is_short, find_precision(dtype))


@lru_cache(maxsize=64)
def _cached_options(
    kernel: str, dtype: torch.dtype, head_dim: int, is_short: bool, precision: str
) -> tuple[int, dict[str, Any]]:
    if dtype != torch.float32:
        tiling = (SHORT_HALF_TILINGS if is_short else HALF_TILINGS)[kernel]
    else:
        tiling = (FLOAT_TILINGS if precision == "ieee" else TF32_TILINGS)[kernel]
    num_warps = 8 if head_dim > _WIDE_HEAD_DIM else tiling.num_warps
    own = tiling.block_s if kernel == "key_value_grad" else tiling.block_t

    return own, {
        "D": head_dim,
        "BLOCK_T": tiling.block_t,
        "BLOCK_S": tiling.block_s,
        "BLOCK_D": min(tiling.block_d, power_of_two(head_dim)),
        "INTERPRETED": is_interpreted(),
        "PRECISION": precision,
        "num_warps": num_warps,
        "num_stages": tiling.num_stages,
    }
