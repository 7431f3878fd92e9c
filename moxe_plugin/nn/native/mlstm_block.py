"""A whole mLSTM block on rows as one function, in C++.

The block of :mod:`moxe_plugin.nn.mlstm`, in float32 or bfloat16 where products are C++.
Between the many short calls of a block, autograd and Python would take longer than some
of them, and where two of them contribute to one gradient, autograd would pass over
memory once more. What comes before the cell, the cell, and what comes after it are one
call each, see :mod:`moxe_plugin.nn.native.block_calls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.block_weights import MLSTMWeights
from moxe_plugin.nn.native.block_calls import BlockCalls, BlockSizes, FunctionName
from moxe_plugin.nn.native.block_params import BlockRows, create_grads
from moxe_plugin.nn.native.mlstm_forms import MLSTMForm

_FUNCTIONS: Final[Sequence[FunctionName]] = (
    ("gating", "moxe_output_forward"),
    ("gating", "moxe_output_backward"),
    ("mlstm_projections", "moxe_mlstm_project"),
    ("mlstm_projections", "moxe_mlstm_project_backward"),
)
"""What the block calls: ``Functions`` of the C++ code."""

_SPARED: Final = frozenset({"up_proj", "q_proj", "k_proj", "v_proj", "down_proj"})
"""The parameters whose gradients are not computed if they are not wanted."""


def mlstm_block_rows(
    flat: Tensor,
    weights: MLSTMWeights,
    rows: BlockRows,
    form: MLSTMForm,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Apply the block to sequences, each from an empty memory.

    All tensors are of one type, on the CPU, where products of it are C++, and
    :func:`~moxe_plugin.nn.native.mlstm_projections.fits`.

    :param flat: *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Whose rows they are.
    :param form: Runs the cell.
    :param num_heads: The number of heads H.
    :param eps: What norms add to the variance.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _MLSTMBlockRows.apply(rows, form, num_heads, eps, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _Kept(NamedTuple):
    # What the way back reads: ``Rows`` of the C++ code.
    flat: Tensor  # (C,M)
    normed: Tensor  # (C,M)
    stats: Tensor  # (C,2)
    conv_input: Tensor  # (C,I), as all that have no shape here
    gate: Tensor
    convolved: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor  # (C,2H)
    hidden: Tensor | None  # (C,H,D), once there is one
    gated: Tensor
    out_stats: Tensor  # (C,2H)


class _MLSTMBlockRows(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any,
        rows: BlockRows,
        form: MLSTMForm,
        num_heads: int,
        eps: float,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        weights = MLSTMWeights(*[x.contiguous() for x in params])
        flat = flat.contiguous()
        num_rows, inner_dim = flat.size(0), weights.down_proj.size(-2)

        stats, gates, out_stats = (
            flat.new_empty(num_rows, width, dtype=torch.float32)
            for width in (2, 2 * num_heads, 2 * num_heads)
        )
        conv_input, gate, convolved, gated = (
            flat.new_empty(num_rows, inner_dim) for _ in range(4)
        )
        q, k, v = flat.new_empty(3, num_rows, inner_dim).unbind()
        kept = _Kept(
            *(flat, torch.empty_like(flat), stats, conv_input, gate, convolved),
            *(q, k, v, gates),
            hidden=None,
            gated=gated,
            out_stats=out_stats,
        )
        calls = _create_calls(flat, weights, rows, num_heads, eps)
        numbers = (weights.q_proj.size(-3),)

        calls.call("moxe_mlstm_enter", numbers, weights, kept)
        # (C,I) -> (C,H,D)
        q, k, v = (x.view(num_rows, num_heads, -1) for x in (q, k, v))
        hidden, saved = form.forward(q, k, v, gates)
        kept = kept._replace(hidden=hidden)
        out = torch.empty_like(flat)
        calls.call("moxe_mlstm_leave", numbers, weights, kept, out)

        ctx.save_for_backward(*kept, *weights, *saved)
        ctx.rows, ctx.form, ctx.num_heads, ctx.eps = rows, form, num_heads, eps

        return out

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        num_kept = len(_Kept._fields)
        num_params = len(MLSTMWeights._fields)
        kept = _Kept(*tensors[:num_kept])
        weights = MLSTMWeights(*tensors[num_kept:][:num_params])
        saved = tensors[num_kept + num_params :]
        form: MLSTMForm = ctx.form

        needs_flat, *needs = ctx.needs_input_grad[4:]
        grads = create_grads(weights, needs, _SPARED)
        grad_out, grad_flat = grad_out.contiguous(), torch.empty_like(kept.flat)
        grad_hidden, grad_convolved, grad_gate = (
            torch.empty_like(kept.gate) for _ in range(3)
        )
        calls = _create_calls(kept.flat, weights, ctx.rows, ctx.num_heads, ctx.eps)
        numbers = (weights.q_proj.size(-3),)

        calls.call(
            *("moxe_mlstm_leave_backward", numbers, weights, kept, grads),
            *(grad_out, grad_hidden, grad_convolved, grad_gate),
        )
        of_cell = form.backward(
            saved, grad_hidden.view(grad_hidden.size(0), ctx.num_heads, -1)
        )
        calls.call(
            *("moxe_mlstm_enter_backward", numbers, weights, kept, grads),
            *(grad_out, *(x.contiguous() for x in of_cell)),
            *(grad_convolved, grad_gate, grad_flat),
        )

        return *(None,) * 4, grad_flat if needs_flat else None, *grads


def _create_calls(
    flat: Tensor, weights: MLSTMWeights, rows: BlockRows, num_heads: int, eps: float
) -> BlockCalls:
    sizes = BlockSizes(
        *(weights.conv_weight.size(-2), flat.size(1)),
        *(weights.down_proj.size(-2), num_heads),
    )

    return BlockCalls("mlstm_block", _FUNCTIONS, flat, rows, sizes, eps)
