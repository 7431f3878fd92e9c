"""Cross-entropy of rows of logits on a GPU, with its gradient in their place.

One program runs over a row twice; the second time most of it is still in the cache.
Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import power_of_two

_MAX_BLOCK = 4096


def cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, wants_grad: bool
) -> Tensor:
    """Compute ``-log softmax(logits)[target]`` of each row.

    Everything between logits and results is float32. Looking at targets would make the
    CPU wait: the loss of one that is no column is NaN.

    :param logits: Contiguous; become the gradient of the weighed sum of the results if
        that is wanted. *Shape:* ``(T,V)``.
    :param targets: Where a row's weight is 0, any number. *Shape:* ``(T)``.
    :param weights: How much each row counts. Float32. *Shape:* ``(T)``.
    :param wants_grad: Whether to write the gradient.

    :returns: What each row has, in nats; 0 where its weight is. Float32. *Shape:*
        ``(T)``.
    """
    num_rows, num_columns = logits.shape
    targets, weights = targets.contiguous(), weights.contiguous()
    losses = torch.empty_like(weights)

    if num_rows:
        block = min(power_of_two(num_columns), _MAX_BLOCK)
        _cross_entropy_kernel[(num_rows,)](
            *(logits, targets, weights, losses),
            V=num_columns,
            WRITES=wants_grad,
            BLOCK=block,
            num_warps=8,
        )

    return losses


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]  # as above
    logits,
    targets,
    weights,
    losses,
    V: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * V
    weight = tl.load(weights + row)
    target = tl.load(targets + row).to(tl.int64)
    is_column = (target >= 0) & (target < V)
    of_target = tl.load(at + target, mask=is_column, other=float("nan"))

    # The largest so far, and each lane's sum of exp(x - peak)
    peak = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        x = tl.load(at + cols, mask=cols < V, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        # Of nothing but -inf, not even the difference is a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        peak = higher

    log_sum = peak + tl.log(tl.sum(total, 0))
    loss = log_sum - of_target.to(tl.float32)
    tl.store(losses + row, tl.where(weight == 0, 0.0, loss))

    if WRITES:
        # The logit of the target has been read by all threads.
        tl.debug_barrier()
        for begin in range(0, V, BLOCK):
            cols = begin + tl.arange(0, BLOCK)
            x = tl.load(at + cols, mask=cols < V, other=float("-inf"))
            grad = tl.exp(x.to(tl.float32) - log_sum) - tl.where(cols == target, 1, 0)
            grad = tl.where(weight == 0, 0.0, weight * grad)
            tl.store(at + cols, grad.to(logits.dtype.element_ty), mask=cols < V)
