"""Which row each choice becomes, as two Triton kernels with a program per sequence.

The first counts what each expert gets of each sequence; the second adds these counts
up to first rows, and gives rows to the choices in order of time. No program writes
where another does, so that the order of execution does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two

_TILE = 2048
"""Choices times experts, or experts times sequences, that a program holds at once."""


class PlacedRows(NamedTuple):
    """What the kernels write; int32, G is the number of banks, at most 2.

    In the tensors of all banks a bank's part begins at a multiple of 16 bytes, as
    kernels are compiled anew for a pointer that does not.
    """

    seq_lens: Tensor
    """What each expert gets of each sequence. *Shape:* ``(E,N)``."""

    begins: Tensor
    """The first row, in its bank, of each segment of the bank, and the bank's number of
    rows; the rest is not set. *Shape:* ``(G,E*N+1 or a little more)``."""

    segment_of_row: Tensor
    """The segment, in its bank, of each row of the bank; the rest is not set. *Shape:*
    ``(G,T*K or a little more)``."""

    step_of_row: Tensor
    """Where each row stands in its segment; the rest is not set. *Shape:* as
    ``segment_of_row``."""

    token_of_row: Tensor
    """The token of each row of all banks; the rest is 0. *Shape:* ``(T*K)``."""

    row_of_choice: Tensor
    """The row of each choice among those of all banks; -1 if it was not sent. *Shape:*
    ``(T,K)``."""


def place_rows(
    expert_indices: Tensor, token_mask: Tensor | None, bank_sizes: list[int]
) -> PlacedRows:
    """Give a row to every choice, without waiting for the device.

    :param expert_indices: The distinct experts of each token, -1 at empty places; int32
        or int64. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send; all if ``None``. *Shape:* ``(N,S)``.
    :param bank_sizes: How many experts each of the at most two banks has.

    :returns: The rows.
    """
    expert_indices = expert_indices.contiguous()
    has_mask = token_mask is not None
    mask = expert_indices if token_mask is None else token_mask.contiguous()
    num_seqs, seq_len, top_k = expert_indices.shape
    num_choices = num_seqs * seq_len * top_k
    num_experts, num_banks = sum(bank_sizes), len(bank_sizes)

    def empty(*shape: int) -> Tensor:
        return expert_indices.new_empty(shape, dtype=torch.int32)

    begins_len = ceil_div(num_experts * num_seqs + 1, 4) * 4
    capacity = ceil_div(num_choices, 4) * 4
    segments_and_steps = empty(2, num_banks, capacity)

    placed = PlacedRows(
        empty(num_experts, num_seqs),
        empty(num_banks, begins_len),
        segments_and_steps[0],
        segments_and_steps[1],
        empty(num_choices),
        empty(num_seqs * seq_len, top_k),
    )

    block_experts = power_of_two(num_experts)
    block = max(_TILE // block_experts, 16)
    sizes = (num_seqs, seq_len * top_k)
    options = {
        "TOP_K": top_k,
        "NUM_EXPERTS": num_experts,
        "HAS_MASK": has_mask,
        "BLOCK": block,
        "BLOCK_EXPERTS": block_experts,
    }
    _count_kernel[(num_seqs,)](expert_indices, mask, placed.seq_lens, *sizes, **options)
    _place_kernel[(num_seqs,)](
        *(expert_indices, mask, *placed, *sizes, begins_len, capacity),
        NUM_FIRST=bank_sizes[0],
        **options,
    )

    return placed


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _load_experts(  # type: ignore[no-untyped-def]  # as above
    experts,
    mask,
    choice,
    is_inside,
    TOP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    expert = tl.load(experts + choice, mask=is_inside, other=-1).to(tl.int32)
    if HAS_MASK:
        is_sent = tl.load(mask + choice // TOP_K, mask=is_inside, other=0)
        expert = tl.where(is_sent != 0, expert, -1)

    return expert


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _count_kernel(  # type: ignore[no-untyped-def]  # as above
    experts,
    mask,
    seq_lens,
    num_seqs,
    seq_choices,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    seq = tl.program_id(0)
    ids = tl.arange(0, BLOCK_EXPERTS)
    count = tl.zeros((BLOCK_EXPERTS,), tl.int32)

    begin = 0
    while begin < seq_choices:
        offset = begin + tl.arange(0, BLOCK)
        expert = _load_experts(
            *(experts, mask, seq * seq_choices + offset, offset < seq_choices),
            TOP_K=TOP_K,
            HAS_MASK=HAS_MASK,
        )
        # An empty place is no expert's.
        count += tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), 0)
        begin += BLOCK

    tl.store(seq_lens + ids * num_seqs + seq, count, mask=ids < NUM_EXPERTS)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _add_up(  # type: ignore[no-untyped-def]  # as above
    seq_lens,
    seq,
    num_seqs,
    NUM_FIRST: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    # The first row of a sequence at each expert, the second bank's first row, and the
    # number of rows
    ids = tl.arange(0, BLOCK_EXPERTS)
    total = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    before = tl.zeros((BLOCK_EXPERTS,), tl.int32)

    begin = 0
    while begin < num_seqs:
        others = begin + tl.arange(0, BLOCK)
        lens = tl.load(
            seq_lens + ids[:, None] * num_seqs + others[None, :],
            mask=(ids < NUM_EXPERTS)[:, None] & (others < num_seqs)[None, :],
            other=0,
        )
        total += tl.sum(lens, 1)
        before += tl.sum(tl.where(others[None, :] < seq, lens, 0), 1)
        begin += BLOCK

    first_row = tl.cumsum(total, 0) - total + before
    boundary = tl.sum(tl.where(ids < NUM_FIRST, total, 0), 0)

    return first_row, boundary, tl.sum(total, 0)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _place_kernel(  # type: ignore[no-untyped-def]  # as above
    experts,
    mask,
    seq_lens,
    begins,
    segment_of_row,
    step_of_row,
    token_of_row,
    row_of_choice,
    num_seqs,
    seq_choices,
    begins_len,
    capacity,
    NUM_FIRST: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    seq = tl.program_id(0)
    ids = tl.arange(0, BLOCK_EXPERTS)
    is_second = (ids >= NUM_FIRST).to(tl.int32)

    next_row, boundary, num_rows = _add_up(
        *(seq_lens, seq, num_seqs),
        NUM_FIRST=NUM_FIRST,
        NUM_EXPERTS=NUM_EXPERTS,
        BLOCK=BLOCK,
        BLOCK_EXPERTS=BLOCK_EXPERTS,
    )

    # Segments and their first rows in their banks
    segment = (ids - is_second * NUM_FIRST) * num_seqs + seq
    first_row = next_row - is_second * boundary
    tl.store(
        begins + is_second * begins_len + segment, first_row, mask=ids < NUM_EXPERTS
    )
    if seq == 0:
        tl.store(begins + NUM_FIRST * num_seqs, boundary)
        if NUM_FIRST < NUM_EXPERTS:
            last = (NUM_EXPERTS - NUM_FIRST) * num_seqs
            tl.store(begins + begins_len + last, num_rows - boundary)

    step = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    begin = 0
    while begin < seq_choices:
        offset = begin + tl.arange(0, BLOCK)
        choice = seq * seq_choices + offset
        is_inside = offset < seq_choices
        expert = _load_experts(
            *(experts, mask, choice, is_inside), TOP_K=TOP_K, HAS_MASK=HAS_MASK
        )
        is_sent = expert >= 0

        # As a token's experts are distinct, choices come in order of time.
        is_own = (expert[:, None] == ids[None, :]).to(tl.int32)
        earlier = tl.cumsum(is_own, 0) - is_own + step[None, :]
        own_step = tl.sum(is_own * earlier, 1)
        row = tl.sum(is_own * next_row[None, :], 1) + own_step
        own_segment = tl.sum(is_own * segment[None, :], 1)

        # In the second bank's part
        is_late = (expert >= NUM_FIRST).to(tl.int32)
        at = row + is_late * (capacity - boundary)
        tl.store(segment_of_row + at, own_segment, mask=is_sent)
        tl.store(step_of_row + at, own_step, mask=is_sent)
        tl.store(token_of_row + row, choice // TOP_K, mask=is_sent)
        # No choice has this row.
        tl.store(token_of_row + choice, 0, mask=is_inside & (choice >= num_rows))
        tl.store(row_of_choice + choice, tl.where(is_sent, row, -1), mask=is_inside)

        step += tl.sum(is_own, 0)
        begin += BLOCK
