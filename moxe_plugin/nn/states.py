"""States that a step of a generation writes into, where it may."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT", bound="tuple[Any, ...]")


def take_state(state: StateT, *, reuse: bool) -> StateT:
    """Return a state that may be written into.

    :param state: A NamedTuple of tensors.
    :param reuse: Whether its own tensors may be written into. Copied all the same are
        those that autograd has seen, those of inference mode outside of it, which
        cannot be written there, and those that are not contiguous.

    :returns: The state, of contiguous tensors.
    """
    return type(state)(
        *(
            x
            if reuse and _is_writable(x)
            else x.clone(memory_format=torch.contiguous_format)
            for x in state
        )
    )


def _is_writable(x: Tensor) -> bool:
    return (
        x.is_contiguous()
        and not x.requires_grad
        and (torch.is_inference_mode_enabled() or not x.is_inference())
    )
