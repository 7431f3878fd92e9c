"""Sums of the rows of tokens' choices, and their gradients, in C++.

Each token has K choices, and each choice that was sent a row of its own in one of the
banks, whose rows are numbered through. Sums of bfloat16 are float32 until they are
written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import SUFFIXES, find_function, pointers_to


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
