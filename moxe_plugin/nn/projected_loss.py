"""Cross-entropy of an output projection, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.padding import widen
from moxe_plugin.nn.products import add_product, multiply

CHUNK_SIZE = 512
"""How many tokens are projected at a time."""


def projected_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor
) -> Tensor:
    """Compute the weighted sum of ``-log softmax(hidden @ weight^T)[target]``.

    The logits ``(T,V)`` of a large vocabulary are by far the largest tensor of a
    training step. Here only ``CHUNK_SIZE`` rows of them exist, and become the gradient
    in place, as long as gradients are wanted: the backward pass only scales what the
    forward pass has made. Softmax and sum are float32, or float64 for such logits.

    :param hidden: The decoder's output. *Shape:* ``(T,M)``.
    :param weight: The weight of the projection. *Shape:* ``(V,M)``.
    :param targets: The ids of the right tokens. *Shape:* ``(T)``.
    :param target_weights: How much each token counts; where it is 0, the target may be
        any number. *Shape:* ``(T)``.

    :returns: The sum, in nats. *Shape:* ``()``.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)

    wants_grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad
    )

    with torch.autocast(hidden.device.type, enabled=False):
        return _ProjectedCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped
            hidden, weight, targets, target_weights, dtype, wants_grad
        )


class _ProjectedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        target_weights: Tensor,
        dtype: torch.dtype,
        wants_grad: bool,
    ) -> Tensor:
        rows, table = hidden.to(dtype), weight.to(dtype)
        targets = targets.where(target_weights != 0, 0)

        loss = widen(rows[:0]).new_zeros(())
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight: Tensor | None = None

        for begin in range(0, len(rows), CHUNK_SIZE):
            chunk = slice(begin, begin + CHUNK_SIZE)
            logits = widen(multiply(rows[chunk], table.mT))
            index = targets[chunk].unsqueeze(-1)
            weights = target_weights[chunk].to(logits.dtype)

            logits -= logits.amax(dim=-1, keepdim=True)
            of_target = logits.gather(-1, index).squeeze(-1)
            logits.exp_()
            total = logits.sum(dim=-1)
            loss += torch.dot(total.log() - of_target, weights)

            if grad_hidden is None:
                continue

            # Softmax minus one-hot, weighed: the gradient of the loss.
            logits *= (weights / total).unsqueeze(-1)
            logits.scatter_add_(-1, index, -weights.unsqueeze(-1))

            grad = logits.to(dtype)
            grad_hidden[chunk] = multiply(grad, table)
            if grad_weight is None:
                grad_weight = widen(multiply(grad.mT, rows[chunk]))
            else:
                add_product(grad_weight, grad.mT, rows[chunk])

        if wants_grad and grad_weight is None:
            grad_weight = torch.zeros_like(weight)

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype

        return loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad

        # The usual case, and a pass over the weights less. On a GPU, looking is dear.
        if grad_output.device.type != "cpu" or grad_output.item() != 1:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
            grad_weight = grad_weight * grad_output

        return (
            grad_hidden if needs_hidden else None,
            grad_weight.to(ctx.weight_dtype) if needs_weight else None,
            *(None, None, None, None),
        )
