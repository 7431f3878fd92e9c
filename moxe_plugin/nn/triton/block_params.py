"""The parameters of blocks and banks in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

_ALIGNED_SIZE: Final = 8
"""What keeps parameters in one buffer at multiples of 16 bytes, as kernels are compiled
anew for one that is not."""


def stack_params(
    params: Sequence[Tensor], dtype: torch.dtype, stacked: Sequence[int]
) -> list[Tensor]:
    """Bring parameters into the form that kernels read.

    :param params: Those of a bank, or of a block that is none; the first is a vector
        for each expert.
    :param dtype: What is computed in.
    :param stacked: Which of them must have E first, though E be 1. Kernels get only the
        addresses of the others.

    :returns: The same, contiguous; of a block that is no bank, ``stacked`` ones are
        ``(1,…)``.
    """
    is_bank = params[0].ndim == 2
    # Each call that does nothing has its cost, too.
    params = [x if x.is_contiguous() else x.contiguous() for x in params]
    if any([x.dtype is not dtype for x in params]):
        params = _convert(params, dtype)

    if not is_bank:
        for i in stacked:
            params[i] = params[i].unsqueeze(0)

    return params


def _convert(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    # Under autocast at each step: one launch for all of a block
    sizes = [x.numel() for x in params]
    together = [
        i
        for i, x in enumerate(params)
        if x.dtype is not dtype and sizes[i] % _ALIGNED_SIZE == 0
    ]
    if together:
        sources = [params[i] for i in together]
        buffer = torch.empty(
            sum([sizes[i] for i in together]), dtype=dtype, device=params[0].device
        )
        copies = _unflatten_dense_tensors(buffer, sources)
        torch._foreach_copy_(copies, sources)
        for i, copy in zip(together, copies, strict=True):
            params[i] = copy

    return [x.to(dtype) for x in params]


def unstack_grads(
    grads: Sequence[Tensor], params: Sequence[tuple[torch.dtype, torch.Size]]
) -> list[Tensor]:
    """Bring gradients into the form of the parameters.

    :param grads: The gradients of what :func:`stack_params` returned.
    :param params: The type and the shape of each parameter.

    :returns: The gradients.
    """
    return [
        x if x.dtype is dtype and x.ndim == len(shape) else x.to(dtype).view(shape)
        for x, (dtype, shape) in zip(grads, params, strict=True)
    ]
