"""The parameters of blocks and banks in one form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_params(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Bring parameters into the form that kernels read.

    :param params: Those of a bank, or of a block that is none; the first is a vector
        for each expert.
    :param dtype: What is computed in.

    :returns: The same, contiguous, with E first; E is 1 for a block that is no bank.
    """
    is_bank = params[0].ndim == 2
    params = [x.to(dtype).contiguous() for x in params]

    return params if is_bank else [x.unsqueeze(0) for x in params]
