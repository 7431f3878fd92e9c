"""The rows of tokens' choices, their sums, and the gradients of these, in C++.

Each token has K choices, and each choice that was sent a row of its own in one of the
banks, whose rows are numbered through. Sums of bfloat16 are float32 until they are
written.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import (
    SUFFIXES,
    find_function,
    int64_array,
    pointers_to,
)


class PlannedRows(NamedTuple):
    """The rows of all banks, numbered through; C of them, int64.

    They come by expert, sequence and time. A segment is a sequence's part at an expert;
    those of each bank are counted from 0, as are its slots, of which each of its
    segments has as many as the longest has rows.
    """

    seq_lens: list[int]
    """The number of rows of each segment: E * N of them."""

    row_of_choice: Tensor
    """The row of each choice; -1 if it was not sent. *Shape:* ``(T,K)``."""

    token_of_row: Tensor
    """*Shape:* ``(C)``."""

    slot_of_row: Tensor
    """*Shape:* ``(C)``."""

    segment_of_row: Tensor
    """*Shape:* ``(C)``."""

    step_of_row: Tensor
    """Where each row stands in its segment, from 0. *Shape:* ``(C)``."""


def plan_choices(
    expert_indices: Tensor, token_mask: Tensor | None, bank_sizes: Sequence[int]
) -> PlannedRows:
    """Give a row to every choice that is sent.

    :param expert_indices: The distinct experts of each token, on the CPU; -1 at places
        that it leaves empty. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send, on the CPU; all if ``None``. *Shape:*
        ``(N,S)``.
    :param bank_sizes: How many experts each bank has, E in all.

    :returns: The rows.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    # As C++ reads them
    expert_indices = expert_indices.long().contiguous()
    if token_mask is not None:
        token_mask = token_mask.bool().contiguous()

    num_seqs, _, top_k = shape = expert_indices.shape
    lens = array("q", bytes(8 * sum(bank_sizes) * num_seqs))
    numbers = expert_indices.new_empty(5, expert_indices.numel()).unbind()

    # All of them live until the call returns: this function holds them.
    find_function("row_dispatch", "moxe_plan_rows")(
        int64_array([*shape, len(bank_sizes)]),
        int64_array(bank_sizes),
        *pointers_to(expert_indices, token_mask),
        ctypes.c_void_p(lens.buffer_info()[0]),
        *pointers_to(*numbers),
    )

    seq_lens = lens.tolist()
    of_choices, *of_rows = numbers
    num_rows = sum(seq_lens)

    return PlannedRows(
        seq_lens, of_choices.view(-1, top_k), *(x[:num_rows] for x in of_rows)
    )


def sum_choices(
    banks: Sequence[Tensor], weights: Tensor | None, row_of_choice: Tensor
) -> Tensor:
    """Sum the rows of each token's choices.

    :param banks: The rows of each bank, all of one dtype of
        :data:`~moxe_plugin.nn.native.library.SUFFIXES`, contiguous and on the CPU.
        *Shape:* ``(C,M)`` each, C may differ.
    :param weights: What to multiply them by, contiguous and of the same type, but
        float32 for bfloat16; nothing if ``None``. *Shape:* ``(T,K)``.
    :param row_of_choice: The row of each choice, int64 and contiguous; -1 if it was not
        sent, which adds nothing. *Shape:* ``(T,K)``.

    :returns: *Shape:* ``(T,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    out = banks[0].new_empty(row_of_choice.size(0), banks[0].size(1))

    _call("sum", banks, row_of_choice, weights, out)

    return out


def sum_choices_backward(
    grad_out: Tensor,
    banks: Sequence[Tensor],
    weights: Tensor,
    row_of_choice: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`sum_choices`.

    :param grad_out: Contiguous. *Shape:* ``(T,M)``.
    :param banks: As there; every row must be that of a choice.
    :param weights: As there. *Shape:* ``(T,K)``.
    :param row_of_choice: As there. *Shape:* ``(T,K)``.

    :returns: The gradients of the rows of all banks, ``(C,M)``, and that of the
        weights, ``(T,K)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    num_rows = sum(bank.size(0) for bank in banks)
    grad_rows = grad_out.new_empty(num_rows, grad_out.size(1))
    grad_weights = torch.empty_like(weights)

    _call("spread", banks, row_of_choice, weights, grad_out, grad_rows, grad_weights)

    return grad_rows, grad_weights


def _call(
    name: str,
    banks: Sequence[Tensor],
    row_of_choice: Tensor,
    weights: Tensor | None,
    *tensors: Tensor,
) -> None:
    shape = *row_of_choice.shape, banks[0].size(1)
    ends = accumulate(bank.size(0) for bank in banks)

    function = find_function(
        "row_dispatch", f"moxe_{name}_choices_{SUFFIXES[banks[0].dtype]}"
    )

    # Each tensor lives until the call returns: the caller holds them.
    function(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        (ctypes.c_void_p * len(banks))(*(bank.data_ptr() for bank in banks)),
        (ctypes.c_int64 * len(banks))(*ends),
        *pointers_to(row_of_choice, weights, *tensors),
    )
