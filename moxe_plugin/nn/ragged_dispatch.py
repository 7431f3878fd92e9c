"""Move tokens to the rows of their experts, and back, without padding.

As :mod:`moxe_plugin.nn.dispatch`, but to ragged rows (:mod:`moxe_plugin.nn.ragged`)
rather than grids, and by Triton kernels, which do the work in few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.ragged import RaggedRows, with_dense_rows

if TYPE_CHECKING:
    from moxe_plugin.nn.triton.row_plan import PlacedRows


class RowPlan(NamedTuple):
    """Which token stands where; C is the number of rows of all banks.

    In order of the banks, the rows of all of them are numbered through.
    """

    banks: list[RaggedRows]
    """Where the rows of each bank stand."""

    num_rows: list[int]
    """The number of rows of each bank; they sum to C."""

    row_of_choice: Tensor
    """The row of each choice, int32; -1 if it was not sent. *Shape:* ``(T,K)``."""


def send_tokens(
    tokens: Tensor,
    expert_indices: Tensor,
    token_mask: Tensor | None,
    bank_sizes: Sequence[int],
) -> tuple[RowPlan, tuple[Tensor, ...]]:
    """Give a row to every choice, and copy tokens into the rows of their experts.

    Waits once for the device, for the numbers of rows.

    :param tokens: *Shape:* ``(T,M)``, ``T = N * S``.
    :param expert_indices: The distinct experts of each token; -1 at places that it
        leaves empty, to which nothing is sent. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send; all if ``None``. *Shape:* ``(N,S)``.
    :param bank_sizes: How many experts each bank has: first come the experts of the
        first bank, and so on.

    :returns: The plan, and the rows of each bank; they lie one behind the other, and
        must not be changed in place. *Shape:* ``(C,M)`` each, C may differ.

    :raises ValueError: There are neither one nor two banks.
    """
    if not 1 <= len(bank_sizes) <= 2:
        raise ValueError(
            f"`bank_sizes` must have 1 or 2 numbers, but has {len(bank_sizes)} instead."
        )

    plan, *banks = _SendTokens.apply(tokens, expert_indices, token_mask, bank_sizes)  # type: ignore[no-untyped-call]  # torch leaves apply untyped

    return plan, tuple(banks)


def _wait_for_plan(
    placed: PlacedRows, num_seqs: int, bank_sizes: Sequence[int]
) -> RowPlan:
    # What needs no number of rows comes before the wait.
    begins = [
        x[: size * num_seqs + 1]
        for x, size in zip(placed.begins.unbind(), bank_sizes, strict=True)
    ]
    segments, steps = placed.segment_of_row.unbind(), placed.step_of_row.unbind()

    # The one copy to the host
    seq_lens: list[list[int]] = placed.seq_lens.tolist()

    banks, num_rows, expert = [], [], 0

    for idx, size in enumerate(bank_sizes):
        bank_lens = seq_lens[expert : expert + size]
        counts = [sum(lens) for lens in bank_lens]
        bank_rows = sum(counts)

        banks.append(
            RaggedRows(
                num_seqs,
                counts,
                max(max(lens) for lens in bank_lens),
                *(begins[idx], segments[idx][:bank_rows], steps[idx][:bank_rows]),
            )
        )
        num_rows.append(bank_rows)
        expert += size

    return RowPlan(banks, num_rows, placed.row_of_choice)


def combine_rows(
    banks: Sequence[Tensor], weights: Tensor, plan: RowPlan, out_dtype: torch.dtype
) -> Tensor:
    """Sum the weighted outputs of each token's experts: MoxE eq. (9).

    The sum is taken in float32.

    :param banks: The outputs of the rows of each bank. *Shape:* ``(C,M)`` each, C may
        differ.
    :param weights: The weights of the experts. *Shape:* ``(T,K)``.
    :param plan: The plan by which the banks' inputs were sent.
    :param out_dtype: The type of the sums.

    :returns: The sums; exactly 0 for tokens that were not sent. *Shape:* ``(T,M)``.
    """
    return _CombineRows.apply(weights, plan, out_dtype, *banks)  # type: ignore[no-any-return, no-untyped-call]  # as above


class _SendTokens(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        tokens: Tensor,
        expert_indices: Tensor,
        token_mask: Tensor | None,
        bank_sizes: Sequence[int],
    ) -> tuple[Any, ...]:
        from moxe_plugin.nn.triton.row_plan import place_rows

        placed = place_rows(expert_indices, token_mask, list(bank_sizes))
        # Before the numbers of rows are there: with them, fewer would be copied where
        # some are not sent, but device and host would wait for each other.
        rows = tokens.index_select(0, placed.token_of_row)
        plan = _wait_for_plan(placed, expert_indices.size(0), bank_sizes)

        ctx.row_of_choice, ctx.dtype = plan.row_of_choice, tokens.dtype

        sizes = [*plan.num_rows, rows.size(0) - sum(plan.num_rows)]

        return plan, *rows.split(sizes)[:-1]

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, _: None, *grad_banks: Tensor) -> tuple[Tensor | None, ...]:
        from moxe_plugin.nn.triton.row_dispatch import sum_choices

        grad = sum_choices(
            [with_dense_rows(x) for x in grad_banks], None, ctx.row_of_choice, ctx.dtype
        )

        return grad, None, None, None


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

        banks = tuple(with_dense_rows(x) for x in banks)
        ctx.save_for_backward(weights, *banks)
        ctx.row_of_choice, ctx.num_rows = plan.row_of_choice, plan.num_rows

        return sum_choices(banks, weights, plan.row_of_choice, out_dtype)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moxe_plugin.nn.triton.row_dispatch import sum_choices_backward

        weights, *banks = ctx.saved_tensors

        grad_rows, grad_weights = sum_choices_backward(
            with_dense_rows(grad_output), banks, weights, ctx.row_of_choice
        )

        return grad_weights, None, None, *grad_rows.split(ctx.num_rows)
