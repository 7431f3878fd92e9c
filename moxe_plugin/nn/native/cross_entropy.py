"""Cross-entropy of rows of logits on a CPU, with its gradient in their place, in C++.

All is one pass over memory, where torch makes seven.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import find_function, pointers_to

SUFFIXES: Final = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
}
"""The types of logits that it takes; the values are names in the C++ code."""


def cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, wants_grad: bool
) -> Tensor:
    """Compute ``-log softmax(logits)[target]`` of each row.

    Everything between logits and results is float32, or float64 for such logits.

    :param logits: On the CPU, their last stride 1; become the gradient of the weighed
        sum of the results if that is wanted. *Shape:* ``(T,V)``.
    :param targets: *Shape:* ``(T)``.
    :param weights: How much each row counts. Float32, or float64 for such logits.
        *Shape:* ``(T)``.
    :param wants_grad: Whether to write the gradient.

    :returns: What each row has, in nats, as ``weights``. *Shape:* ``(T)``.

    :raises IndexError: A target is not a column.
    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    num_rows, num_columns = logits.shape

    if num_rows and not (targets.min() >= 0 and targets.max() < num_columns):
        raise IndexError(
            f"`targets` must be from 0 to {num_columns - 1}, but are from "
            f"{targets.min()} to {targets.max()} instead."
        )

    shape = (num_rows, num_columns, logits.stride(0), wants_grad)
    targets, weights = targets.contiguous(), weights.contiguous()
    losses = torch.empty_like(weights)

    # The tensors live until the call returns: this function holds them.
    find_function("cross_entropy", f"moxe_cross_entropy_{SUFFIXES[logits.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(logits, targets, weights, losses),
    )

    return losses
