"""Cross-entropy of an output projection, without all logits at once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.backend import product_dtype, runs_triton
from moxe_plugin.nn.native.cross_entropy import SUFFIXES, cross_entropy_
from moxe_plugin.nn.native.library import is_readable, why_not_loaded
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.padding import widen
from moxe_plugin.nn.products import (
    add_product,
    multiply,
    multiply_all,
    multiply_widely,
    runs_native,
)

CHUNK_SIZE = 1024
"""How many tokens are projected at a time on a CPU: 0.2 GB for 49,152 words in float32.
Each chunk reads the weight, and each but the first reads and writes its gradient."""

GPU_CHUNK_SIZE = 8192
"""The same elsewhere: 0.8 GB for 49,152 words in bfloat16. Each chunk but the first
reads and writes the float32 gradient of the weight."""

# In bytes: what rows of logits should not be a multiple of, and the gap after each row
# that is.
_PAGE_SIZE: Final = 4096
_ROW_GAP_SIZE: Final = 256


def projected_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor
) -> Tensor:
    """Compute the weighted sum of ``-log softmax(hidden @ weight^T)[target]``.

    The logits ``(T,V)`` of a large vocabulary are by far the largest tensor of a
    training step. Here only ``CHUNK_SIZE`` rows of them exist, or ``GPU_CHUNK_SIZE``,
    and become the gradient in place, as long as gradients are wanted: the backward pass
    only scales what the forward pass has made. Softmax and sum are float32, or float64
    for such logits. On a CPU, the gradient of the weight is of its type where one chunk
    makes it, else float32 until all have.

    :param hidden: The decoder's output. *Shape:* ``(T,M)``.
    :param weight: The weight of the projection. *Shape:* ``(V,M)``.
    :param targets: The ids of the right tokens. *Shape:* ``(T)``.
    :param target_weights: How much each token counts; where it is 0, the target may be
        any number. *Shape:* ``(T)``.

    :returns: The sum, in nats. *Shape:* ``()``.
    """
    # Products in C++ follow autocast.
    keeps_autocast = runs_native(hidden, weight)
    dtype = hidden.dtype
    if not keeps_autocast:
        dtype = torch.promote_types(product_dtype(hidden), product_dtype(weight))

    wants_grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad
    )

    with (
        nullcontext()
        if keeps_autocast
        else torch.autocast(hidden.device.type, enabled=False)
    ):
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
        weights = target_weights.to(widen(rows[:0]).dtype)

        losses = torch.empty_like(weights)
        grad_rows = torch.empty_like(rows) if wants_grad else None
        grad_weight: Tensor | None = None

        chunk_size = CHUNK_SIZE if rows.is_cpu else GPU_CHUNK_SIZE
        for begin in range(0, len(rows), chunk_size):
            chunk = slice(begin, begin + chunk_size)
            logits = _project(rows[chunk], table)

            losses[chunk], grad = _cross_entropy(
                logits, targets[chunk], weights[chunk], wants_grad
            )

            if grad_rows is None or grad is None:
                continue

            multiply_all([Product(grad[None], table[None], grad_rows[None, chunk])])
            if rows.is_cpu and chunk_size >= len(rows):
                # Nothing adds to it, nor reads it soon.
                grad_weight = multiply(grad.mT, rows, streams=True)
            elif grad_weight is None:
                grad_weight = multiply_widely(grad.mT, rows[chunk])
            else:
                add_product(grad_weight, grad.mT, rows[chunk])

        if wants_grad and grad_weight is None:
            grad_weight = torch.zeros_like(weight)

        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype

        return torch.dot(losses, weights)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        of_hidden, of_weight = (
            _scale(grad, grad_output, dtype) if needs_grad else None
            for grad, dtype, needs_grad in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        )

        return of_hidden, of_weight, None, None, None, None


def _project(rows: Tensor, table: Tensor) -> Tensor:
    row_size = rows.element_size() * len(table)
    if row_size % _PAGE_SIZE != 0 or not runs_native(rows, table):
        return multiply(rows, table.mT)

    # The same column of all rows would have few places in a cache. (T,V+gap) -> (T,V)
    gap = _ROW_GAP_SIZE // rows.element_size()
    logits = rows.new_empty(len(rows), len(table) + gap)[:, : len(table)]
    multiply_all([Product(rows[None], table.mT[None], logits[None])])

    return logits


def _scale(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # The usual case, and a pass over the weights less. On a GPU, looking is dear.
    if factor.is_cpu and factor.item() == 1:
        return grad.to(dtype)

    # Were it of no dimension, the factor would be rounded to the gradient's type.
    return torch.mul(grad, factor[None], out=torch.empty_like(grad, dtype=dtype))


def _cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    # The loss of each row, and the gradient of their weighed sum in the logits' place.
    if runs_triton(logits) and type(logits) is Tensor:
        from moxe_plugin.nn.triton import cross_entropy as kernels

        losses = kernels.cross_entropy_(logits, targets, weights, wants_grad=wants_grad)

        return losses, logits if wants_grad else None

    if _runs_native(logits):
        losses = cross_entropy_(logits, targets, weights, wants_grad=wants_grad)

        return losses, logits if wants_grad else None

    wide, index = widen(logits), targets.unsqueeze(-1)

    wide -= wide.amax(dim=-1, keepdim=True)
    of_target = wide.gather(-1, index).squeeze(-1)
    wide.exp_()
    total = wide.sum(dim=-1)
    losses = total.log() - of_target

    if not wants_grad:
        return losses, None

    # Softmax minus one-hot, weighed.
    wide *= (weights / total).unsqueeze(-1)
    wide.scatter_add_(-1, index, -weights.unsqueeze(-1))

    return losses, wide.to(logits.dtype)


def _runs_native(logits: Tensor) -> bool:
    return (
        is_readable(logits)
        and logits.dtype in SUFFIXES
        and not torch.compiler.is_compiling()
        and why_not_loaded("cross_entropy") is None
    )
