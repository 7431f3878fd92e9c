"""A whole sLSTM block on rows as one function, in C++.

As :mod:`moxe_plugin.nn.native.mlstm_block` of the block of
:mod:`moxe_plugin.nn.slstm`.
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
from moxe_plugin.nn.block_weights import SLSTMWeights
from moxe_plugin.nn.native.block_calls import BlockCalls, BlockSizes, FunctionName
from moxe_plugin.nn.native.block_params import BlockRows, create_grads
from moxe_plugin.nn.native.slstm_scan import RowBounds, seqs_of_sum
from moxe_plugin.nn.padding import EMPTY

_FUNCTIONS: Final[Sequence[FunctionName]] = (
    ("gating", "moxe_silu_forward"),
    ("gating", "moxe_silu_backward"),
    ("slstm_scan", "moxe_slstm_forward"),
    ("slstm_scan", "moxe_slstm_backward"),
    ("slstm_scan", "moxe_slstm_shift"),
)
"""What the block calls: ``Functions`` of the C++ code."""

_SPARED: Final = frozenset(
    {"gate_proj", "recurrent_weight", "ffn_up_proj", "ffn_down_proj"}
)
"""The parameters whose gradients are not computed if they are not wanted."""


def slstm_block_rows(
    flat: Tensor, weights: SLSTMWeights, rows: BlockRows, bounds: RowBounds, eps: float
) -> Tensor:
    """Apply the block to sequences, each from an empty memory.

    All tensors are of one type, on the CPU, where products of it are C++.

    :param flat: *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Whose rows they are.
    :param bounds: Where sequences stand.
    :param eps: What norms add to the variance.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _SLSTMBlockRows.apply(rows, bounds, eps, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _Kept(NamedTuple):
    # What the way back reads: ``Rows`` of the C++ code.
    flat: Tensor  # (C,M), as all that have no shape here
    stats: Tensor  # (C,2)
    normed: Tensor
    convolved: Tensor
    outputs: Tensor
    activations: Tensor | None  # (C,H,5,D), if there is a way back
    out_stats: Tensor  # (C,2H)
    hidden: Tensor
    ffn_stats: Tensor  # (C,2)
    ffn_normed: Tensor
    joint: Tensor  # (C,2F)
    gated: Tensor  # (C,F)


class _SLSTMBlockRows(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any,
        rows: BlockRows,
        bounds: RowBounds,
        eps: float,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        weights = SLSTMWeights(*[x.contiguous() for x in params])
        flat = flat.contiguous()
        num_rows, num_heads = flat.size(0), weights.gate_bias.size(-3)
        ffn_dim = weights.ffn_down_proj.size(-2)

        stats, out_stats, ffn_stats = (
            flat.new_empty(num_rows, width, dtype=torch.float32)
            for width in (2, 2 * num_heads, 2)
        )
        normed, convolved, outputs, hidden, ffn_normed, out = (
            torch.empty_like(flat) for _ in range(6)
        )
        activations = None
        if any(ctx.needs_input_grad):
            activations = flat.new_empty(num_rows, 5 * flat.size(1))
        joint, gated = (flat.new_empty(num_rows, i * ffn_dim) for i in (2, 1))
        kept = _Kept(
            *(flat, stats, normed, convolved, outputs, activations),
            *(out_stats, hidden, ffn_stats, ffn_normed, joint, gated),
        )

        _call("forward", weights, rows, bounds, eps, kept, out)

        ctx.save_for_backward(*kept, *weights)
        ctx.rows, ctx.bounds, ctx.eps = rows, bounds, eps

        return out

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        num_kept = len(_Kept._fields)
        kept, weights = _Kept(*tensors[:num_kept]), SLSTMWeights(*tensors[num_kept:])

        needs_flat, *needs = ctx.needs_input_grad[3:]
        grads = create_grads(weights, needs, _SPARED)
        grad_flat = torch.empty_like(kept.flat)

        _call(
            *("backward", weights, ctx.rows, ctx.bounds, ctx.eps, kept),
            *(grads, grad_out.contiguous(), grad_flat),
        )

        return *(None,) * 3, grad_flat if needs_flat else None, *grads


def _call(
    direction: str,
    weights: SLSTMWeights,
    rows: BlockRows,
    bounds: RowBounds,
    eps: float,
    kept: _Kept,
    *tensors: Sequence[Tensor | None] | Tensor,
) -> None:
    sizes = BlockSizes(
        *(weights.conv_weight.size(-2), kept.flat.size(1)),
        *(weights.ffn_down_proj.size(-2), weights.gate_bias.size(-3)),
    )

    BlockCalls("slstm_block", _FUNCTIONS, kept.flat, rows, sizes, eps).call(
        f"moxe_slstm_block_{direction}",
        (bounds.begins.size(1), bounds.padded_len, seqs_of_sum()),
        *(weights, kept, *tensors),
        seqs=(bounds.begins, bounds.lens),
        constants=(EMPTY,),
    )
