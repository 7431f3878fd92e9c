"""Modules of transformers with our products in place of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from typing_extensions import override

from moxe_plugin.nn import products


def check_swap(device: torch.device, precision: str) -> None:
    """Look for what would make swapped products those of torch.

    :param device: Where to compute.
    :param precision: What is computed in.

    :raises ValueError: Something does.
    """
    if (device.type, precision) != ("cpu", "float32"):
        raise ValueError(
            "`swap_linear` needs `device` cpu and `dtype` float32, which alone is "
            f"swapped, but they are '{device}' and '{precision}' instead."
        )

    reason = products.why_torch()
    if reason is not None:
        raise ValueError(
            "`swap_linear` must be false on this machine, but is true: our products "
            f"are torch's here, since {reason}."
        )


@contextmanager
def swapped_linear() -> Iterator[None]:
    """Let :func:`torch.nn.functional.linear` multiply by our product.

    So do all linear layers of transformers then, in the forward and in the backward
    pass; products of attention stay torch's. Only float32 on the CPU is affected.

    :returns: Until the end of which it does.
    """
    original = functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_ours = all(
            x.dtype == torch.float32 and x.device.type == "cpu" for x in (input, weight)
        )

        if not is_ours or input.dim() < 2:
            return original(input, weight, bias)

        # (*,in) -> (R,in) -> (R,out) -> (*,out)
        rows = input.reshape(-1, input.size(-1))
        output: Tensor = _Linear.apply(rows, weight)  # type: ignore[no-untyped-call]  # torch
        if bias is not None:
            output = output + bias

        return output.view(*input.shape[:-1], weight.size(0))

    functional.linear = linear

    try:
        yield
    finally:
        functional.linear = original


class _Linear(Function):
    """``rows @ weight.T``; the gradient of the weight lies in memory as the weight."""

    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)

        return products.multiply(rows, weight.t())

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad

        return (
            products.multiply(grad, weight) if needs_rows else None,
            products.multiply(grad.t(), rows) if needs_weight else None,
        )
