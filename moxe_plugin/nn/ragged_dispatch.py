"""Move tokens to the rows of their experts, and back, without padding.

As :mod:`moxe_plugin.nn.dispatch`, but to ragged rows (:mod:`moxe_plugin.nn.ragged`)
rather than grids, and by Triton kernels, which do the work in few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.ragged import RaggedRows


class RowPlan(NamedTuple):
    """Which token stands where; C is the number of rows of all banks.

    In order of the banks, the rows of all of them are numbered through.
    """

    banks: list[RaggedRows]
    """Where the rows of each bank stand."""

    num_rows: list[int]
    """The number of rows of each bank; they sum to C."""

    token_of_row: Tensor
    """The token of each row of all banks, int32. *Shape:* ``(C)``."""

    row_of_choice: Tensor
    """The row of each choice, int32; -1 if it was not sent. *Shape:* ``(T,K)``."""


def plan_rows(
    expert_indices: Tensor, token_mask: Tensor | None, bank_sizes: Sequence[int]
) -> RowPlan:
    """Give a row to every choice.

    Waits once for the device, for the numbers of rows.

    :param expert_indices: The distinct experts of each token; -1 at places that it
        leaves empty, to which nothing is sent. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send; all if ``None``. *Shape:* ``(N,S)``.
    :param bank_sizes: How many experts each bank has: first come the experts of the
        first bank, and so on.

    :returns: The plan for ``T = N * S`` tokens.

    :raises ValueError: There are neither one nor two banks.
    """
    from moxe_plugin.nn.triton.row_plan import place_rows

    if not 1 <= len(bank_sizes) <= 2:
        raise ValueError(
            f"`bank_sizes` must have 1 or 2 numbers, but has {len(bank_sizes)} instead."
        )

    num_seqs = expert_indices.size(0)
    placed = place_rows(expert_indices, token_mask, list(bank_sizes))

    # The one copy to the host
    seq_lens = placed.seq_lens.cpu()
    counts: list[int] = seq_lens.sum(dim=1).tolist()
    max_lens: list[int] = seq_lens.amax(dim=1).tolist()

    banks, num_rows, expert = [], [], 0

    for idx, size in enumerate(bank_sizes):
        bank_counts = counts[expert : expert + size]
        bank_rows = sum(bank_counts)

        banks.append(
            RaggedRows(
                num_seqs,
                bank_counts,
                max(max_lens[expert : expert + size]),
                placed.begins[idx, : size * num_seqs + 1],
                placed.segment_of_row[idx, :bank_rows],
                placed.step_of_row[idx, :bank_rows],
            )
        )
        num_rows.append(bank_rows)
        expert += size

    return RowPlan(
        banks, num_rows, placed.token_of_row[: sum(num_rows)], placed.row_of_choice
    )


def take_tokens(tokens: Tensor, plan: RowPlan) -> tuple[Tensor, ...]:
    """Copy tokens into the rows of their experts.

    :param tokens: *Shape:* ``(T,M)``.
    :param plan: Where they go.

    :returns: The rows of each bank; they lie one behind the other, and must not be
        changed in place. *Shape:* ``(C,M)`` each, C may differ.
    """
    return _TakeTokens.apply(tokens, plan)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def combine_rows(
    banks: Sequence[Tensor], weights: Tensor, plan: RowPlan, out_dtype: torch.dtype
) -> Tensor:
    """Sum the weighted outputs of each token's experts: MoxE eq. (9).

    The sum is taken in float32.

    :param banks: The outputs of the rows of each bank. *Shape:* ``(C,M)`` each, C may
        differ.
    :param weights: The weights of the experts. *Shape:* ``(T,K)``.
    :param plan: The plan by which the banks' inputs were taken.
    :param out_dtype: The type of the sums.

    :returns: The sums; exactly 0 for tokens that were not sent. *Shape:* ``(T,M)``.
    """
    return _CombineRows.apply(weights, plan, out_dtype, *banks)  # type: ignore[no-any-return, no-untyped-call]  # as above


class _TakeTokens(Function):
    @staticmethod
    @override
    def forward(ctx: Any, tokens: Tensor, plan: RowPlan) -> tuple[Tensor, ...]:
        ctx.row_of_choice, ctx.dtype = plan.row_of_choice, tokens.dtype

        rows = tokens.index_select(0, plan.token_of_row)
        banks: tuple[Tensor, ...] = rows.split(plan.num_rows)

        return banks

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *grad_banks: Tensor) -> tuple[Tensor, None]:
        from moxe_plugin.nn.triton.row_dispatch import sum_choices

        return sum_choices(_dense(grad_banks), None, ctx.row_of_choice, ctx.dtype), None


class _CombineRows(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        weights: Tensor,
        plan: RowPlan,
        out_dtype: torch.dtype,
        *banks: Tensor,
    ) -> Tensor:
        from moxe_plugin.nn.triton.row_dispatch import sum_choices

        banks = _dense(banks)
        ctx.save_for_backward(weights, *banks)
        ctx.row_of_choice, ctx.num_rows = plan.row_of_choice, plan.num_rows

        return sum_choices(banks, weights, plan.row_of_choice, out_dtype)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moxe_plugin.nn.triton.row_dispatch import sum_choices_backward

        weights, *banks = ctx.saved_tensors
        (grad_output,) = _dense([grad_output])

        grad_rows, grad_weights = sum_choices_backward(
            grad_output, banks, weights, ctx.row_of_choice
        )

        return grad_weights, None, None, *grad_rows.split(ctx.num_rows)


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Kernels take any distance between rows, but none between columns.
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
