"""Sums over the rows of each expert, in an order that is always the same.

A kernel whose program b reads the rows ``[b * R, (b + 1) * R)`` writes, for each expert
e that has rows among them, its sum of these to slot ``b + e``. As rows are sorted by
expert, no two programs write to the same slot. :class:`PartialSums` then adds up the
slots of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div

MAX_PARTS: Final = 4
"""How many kernels may leave sums to one :class:`PartialSums`."""

_NARROW = 64, 32
"""Slots and columns that a program adds up at a time, of a few sums."""

_WIDE = 16, 256
"""The same of many sums."""

_MANY = 2048
"""From how many columns on the sums of a kernel are added up in wide tiles."""


class PartialSums:
    """Sums that several kernels leave, added up by one launch.

    :param rows: The rows.
    :param dtype: The type of all gradients; ``None`` for that of the first parameter.
    """

    def __init__(self, rows: RaggedRows, dtype: torch.dtype | None = None) -> None:
        self._rows = rows
        self._dtype = dtype
        self._partials: list[Tensor] = []
        self._rows_per_block: list[int] = []
        self._params: list[Sequence[Tensor]] = []

    def new_slots(self, rows_per_block: int, params: Sequence[Tensor]) -> Tensor:
        """Create the slots of a kernel.

        :param rows_per_block: How many rows a program of it reads, R.
        :param params: What it sums up the gradients of: an expert's sums stand side by
            side in this order. *Shape:* ``([E,]…)`` each.

        :returns: Uninitialised float32; ``width`` is the number of sums of an expert.
            *Shape:* ``(slots,width)``.

        :raises ValueError: ``MAX_PARTS`` kernels have slots already.
        """
        if len(self._partials) == MAX_PARTS:
            raise ValueError(f"No more than {MAX_PARTS} kernels may leave sums.")

        num_experts = self._rows.num_experts
        num_blocks = ceil_div(self._rows.num_rows, rows_per_block)
        partials = torch.empty(
            max(num_blocks + num_experts - 1, 1),
            sum([x.numel() for x in params]) // num_experts,
            dtype=torch.float32,
            device=self._rows.begins.device,
        )

        self._partials.append(partials)
        self._rows_per_block.append(rows_per_block)
        self._params.append(params)

        return partials

    def add_up(self) -> tuple[Tensor, ...]:
        """Add up the slots of each expert, of all kernels.

        :returns: The gradients of all parameters, in the order they were given in, each
            contiguous and of its parameter's shape; 0 for an expert without a row.
        """
        rows = self._rows
        num_experts = rows.num_experts
        params = [x for of_kernel in self._params for x in of_kernel]
        sizes = [x.numel() for x in params]
        dtype = params[0].dtype if self._dtype is None else self._dtype
        out = torch.empty(sum(sizes), dtype=dtype, device=rows.begins.device)

        num_tiles, constants = _plan(
            tuple(sizes),
            tuple([len(x) for x in self._params]),
            tuple(self._rows_per_block),
            num_experts,
        )
        unused = [self._partials[0]] * (MAX_PARTS - len(self._partials))
        _add_up_kernel[(num_tiles, num_experts)](
            *(*self._partials, *unused, rows.begins, out, rows.num_seqs), **constants
        )

        grads: tuple[Tensor, ...] = _unflatten_dense_tensors(out, params)

        return grads


@lru_cache(maxsize=256)
def _plan(
    sizes: tuple[int, ...],
    num_params: tuple[int, ...],
    rows_per_block: tuple[int, ...],
    num_experts: int,
) -> tuple[int, dict[str, Any]]:
    parts = tuple([i for i, count in enumerate(num_params) for _ in range(count)])
    widths = tuple([size // num_experts for size in sizes])
    totals = tuple(
        [
            sum(width for width, of in zip(widths, parts, strict=True) if of == part)
            for part in range(len(num_params))
        ]
    )
    tiles = [_NARROW if total < _MANY else _WIDE for total in totals]
    num_tiles = [ceil_div(x, cols) for x, (_, cols) in zip(totals, tiles, strict=True)]

    return sum(num_tiles), {
        "WIDTHS": widths,
        "PARTS": parts,
        "TOTALS": totals,
        "ROWS_PER_BLOCK": rows_per_block,
        "BLOCK_ROWS": tuple([x for x, _ in tiles]),
        "BLOCK_COLS": tuple([x for _, x in tiles]),
        "ENDS": tuple(accumulate(num_tiles)),
        "NUM_EXPERTS": num_experts,
    }


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def locate(begins, num_seqs, slot, ROWS: tl.constexpr, NUM_EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Tell whose rows a slot is for, and which: their first, and their end.

    A grid of as many programs as there are slots so has rows of one expert in each
    program; where there are none, the end is not after the first.
    """
    MASKED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    experts = tl.arange(0, MASKED)
    is_expert = experts < NUM_EXPERTS
    ends = tl.load(begins + (experts + 1) * num_seqs, mask=is_expert, other=0)
    # The last slot of each expert, ascending
    lasts = (ends + ROWS - 1) // ROWS - 1 + experts
    expert = tl.sum((is_expert & (lasts < slot)).to(tl.int32), 0)

    block = slot - expert
    begin = tl.load(begins + expert * num_seqs)
    end = tl.load(begins + (expert + 1) * num_seqs)

    return expert, tl.maximum(begin, block * ROWS), tl.minimum(end, (block + 1) * ROWS)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _add_up_kernel(  # type: ignore[no-untyped-def]  # as above
    partials_0,
    partials_1,
    partials_2,
    partials_3,
    begins,
    out,
    num_seqs,
    WIDTHS: tl.constexpr,
    PARTS: tl.constexpr,
    TOTALS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ENDS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
):
    partials = (partials_0, partials_1, partials_2, partials_3)
    expert = tl.program_id(1)
    begin = tl.load(begins + expert * num_seqs)
    end = tl.load(begins + (expert + 1) * num_seqs)

    first_tile = 0
    for part in tl.static_range(len(ENDS)):
        tile = tl.program_id(0) - first_tile
        width = TOTALS[part]

        if (tile >= 0) & (tl.program_id(0) < ENDS[part]):
            rows = tl.arange(0, BLOCK_ROWS[part])
            cols = tile * BLOCK_COLS[part] + tl.arange(0, BLOCK_COLS[part])
            # As `tl.zeros` of a shape that two tuples have, which Triton refuses
            total = (rows[:, None] + cols[None, :]) * 0.0
            if end > begin:
                slot = begin // ROWS_PER_BLOCK[part] + expert
                last = (end - 1) // ROWS_PER_BLOCK[part] + expert
                # The interpreter takes no tensor as the end of a range.
                while slot <= last:
                    slots = slot + rows
                    total += tl.load(
                        partials[part] + slots.to(tl.int64)[:, None] * width + cols,
                        mask=(slots <= last)[:, None] & (cols < width)[None, :],
                        other=0.0,
                    )
                    slot += BLOCK_ROWS[part]

            # (E,width) of each parameter, one after the other
            at = cols
            first = 0
            for i in tl.static_range(len(WIDTHS)):
                if PARTS[i] == part:
                    shift = (NUM_EXPERTS - 1) * first + expert * WIDTHS[i]
                    at = tl.where(cols >= first, cols + shift, at)
                    first += WIDTHS[i]
            sums = tl.sum(total, 0).to(out.dtype.element_ty)
            tl.store(out + at, sums, mask=cols < width)

        out += NUM_EXPERTS * width
        first_tile = ENDS[part]
