"""Precision of the cells, and how they pass over right padding."""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = -1e30
"""The logarithm of nothing: finite, so that differences of two are not NaN."""

_PADDING_GATE = 2 * EMPTY


def valid_positions(seq_lens: Tensor, seq_len: int) -> Tensor:
    """Mark the positions that are not right padding.

    :param seq_lens: The lengths. *Shape:* ``([E,]N)``.
    :param seq_len: The padded length S.

    :returns: Booleans. *Shape:* ``([E,]N,S)``.
    """
    return torch.arange(seq_len, device=seq_lens.device) < seq_lens.unsqueeze(-1)


def close_gates(
    input_preact: Tensor, forget_preact: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Make both cells keep their state where a position is padding.

    The input gate becomes ``exp(2 * EMPTY) = 0``, also relative to an empty
    stabiliser, and the forget gate ``sigmoid(-EMPTY) = 1``.

    :param input_preact: Pre-activation of the exponential input gate, float32 or wider.
    :param forget_preact: Pre-activation of the sigmoid forget gate, float32 or wider.
    :param valid: Which positions are not padding. *Shape:* broadcasts to the others.

    :returns: The two pre-activations.
    """
    return (
        torch.where(valid, input_preact, _PADDING_GATE),
        torch.where(valid, forget_preact, -EMPTY),
    )


def widen(x: Tensor) -> Tensor:
    """Convert to float32, the precision of gates and states; keep float64.

    :param x: Any floating-point tensor.

    :returns: The same values in float32 or float64.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
