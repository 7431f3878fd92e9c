"""Move tokens to the rows of their experts, and back, on a CPU.

As :mod:`moxe_plugin.nn.dispatch`, but without padding, which would be copied and left
out again; as :mod:`moxe_plugin.nn.ragged_dispatch` does on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.native.row_dispatch import (
    plan_choices,
    sum_choices,
    sum_choices_backward,
)
from moxe_plugin.nn.rows import Rows


class HostPlan(NamedTuple):
    """Which token stands where; C is the number of rows of all banks.

    In order of the banks, the rows of all of them are numbered through.
    """

    banks: list[Rows]
    """The rows of each bank."""

    num_rows: list[int]
    """The number of rows of each bank; they sum to C."""

    token_of_row: Tensor
    """*Shape:* ``(C)``."""

    row_of_choice: Tensor
    """The row of each choice; -1 if it was not sent. *Shape:* ``(T,K)``."""


def plan_rows(
    expert_indices: Tensor, token_mask: Tensor | None, bank_sizes: Sequence[int]
) -> HostPlan:
    """Give a row to every choice.

    :param expert_indices: The distinct experts of each token; -1 at places that it
        leaves empty, to which nothing is sent. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send; all if ``None``. *Shape:* ``(N,S)``.
    :param bank_sizes: How many experts each bank has: first come the experts of the
        first bank, and so on.

    :returns: The plan.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    num_seqs = expert_indices.size(0)
    planned = plan_choices(expert_indices, token_mask, bank_sizes)

    banks, num_bank_rows = [], []
    first_segment, first_row = 0, 0
    for size in bank_sizes:
        end_segment = first_segment + size * num_seqs
        seq_lens = planned.seq_lens[first_segment:end_segment]
        end_row = first_row + sum(seq_lens)
        of_bank = slice(first_row, end_row)

        banks.append(
            Rows(
                (size, num_seqs, max(seq_lens, default=0)),
                [
                    sum(seq_lens[expert * num_seqs : (expert + 1) * num_seqs])
                    for expert in range(size)
                ],
                seq_lens,
                planned.slot_of_row[of_bank],
                planned.segment_of_row[of_bank],
                planned.step_of_row[of_bank],
            )
        )
        num_bank_rows.append(end_row - first_row)
        first_segment, first_row = end_segment, end_row

    return HostPlan(banks, num_bank_rows, planned.token_of_row, planned.row_of_choice)


def send_tokens(tokens: Tensor, plan: HostPlan) -> tuple[Tensor, ...]:
    """Copy tokens into the rows of their experts.

    :param tokens: Of a dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`, on the
        CPU. *Shape:* ``(T,M)``.
    :param plan: Where they go.

    :returns: The rows of each bank; they lie one behind the other, and must not be
        changed in place. *Shape:* ``(C,M)`` each, C may differ.

    :raises NativeLibraryError: The C++ code of the gradient cannot be compiled here.
    """
    return _SendTokens.apply(tokens, plan)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def combine_rows(banks: Sequence[Tensor], weights: Tensor, plan: HostPlan) -> Tensor:
    """Sum the weighted outputs of each token's experts: MoxE eq. (9).

    :param banks: The outputs of the rows of each bank. *Shape:* ``(C,M)`` each, C may
        differ.
    :param weights: The weights of the experts, of the same type, but float32 for
        bfloat16. *Shape:* ``(T,K)``.
    :param plan: The plan by which the banks' inputs were sent.

    :returns: The sums; exactly 0 for tokens that were not sent. *Shape:* ``(T,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _CombineRows.apply(weights, plan, *banks)  # type: ignore[no-any-return, no-untyped-call]  # as above


class _SendTokens(Function):
    @staticmethod
    @override
    def forward(ctx: Any, tokens: Tensor, plan: HostPlan) -> tuple[Tensor, ...]:
        ctx.row_of_choice = plan.row_of_choice

        rows = tokens.index_select(0, plan.token_of_row)

        return tuple(rows.split(plan.num_rows))

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *grad_banks: Tensor) -> tuple[Tensor, None]:
        grads = [x.contiguous() for x in grad_banks]

        return sum_choices(grads, None, ctx.row_of_choice), None


class _CombineRows(Function):
    @staticmethod
    @override
    def forward(ctx: Any, weights: Tensor, plan: HostPlan, *banks: Tensor) -> Tensor:
        weights, *rows = (x.contiguous() for x in (weights, *banks))
        ctx.save_for_backward(weights, *rows)
        ctx.row_of_choice, ctx.num_rows = plan.row_of_choice, plan.num_rows

        return sum_choices(rows, weights, plan.row_of_choice)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weights, *rows = ctx.saved_tensors

        grad_rows, grad_weights = sum_choices_backward(
            grad_output.contiguous(), rows, weights, ctx.row_of_choice
        )

        return grad_weights, None, *grad_rows.split(ctx.num_rows)
