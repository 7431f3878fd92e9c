"""The mLSTM in its parallel form on ragged rows, for training: no memory comes or goes.

Per segment and head, with ``F_t`` the running sum of ``logsigmoid(f)``, ``a = i - F``,
``A`` the running maximum of a, and ``m = F + A``, as in
:func:`moxe_plugin.nn.mlstm_cell.mlstm_parallel`::

    P_ts = exp(a_s - A_t) q_t.k_s / sqrt(D) for s <= t, else 0;  den_t = sum_s P_ts
    h_t = sum_s P_ts v_s / norm_t;  norm = max(|den|, exp(-m)) + 1e-6

A is known before any product, so nothing is rescaled. Backward, with ``dnorm = -<dh, h>
/ norm`` and ``dP_ts = <dh_t, v_s> / norm_t + dden_t``, every weight is an exponential,
so ``da_s = sum_t P_ts dP_ts = <k_s, dk_s>``.

P, den and ``exp(-m)`` all scale with ``exp(-A)``, so that h depends on A by the 1e-6
only: ``dA = -<dh, h> * 1e-6 / norm``. This is not computed; it is at most 1e-6 of a
term of da where ``norm`` is 1, and rounding says more about a than it does. Where
``exp(-m)`` is clamped h is 0 to 1e-34, and so are its gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.mlstm_cell import MAX_EXPONENT, NORMALIZER_EPS
from moxe_plugin.nn.ragged import RaggedRows, with_dense_rows
from moxe_plugin.nn.triton.mlstm_rows_backward import (
    mlstm_rows_key_value_grad_kernel,
    mlstm_rows_query_grad_kernel,
)
from moxe_plugin.nn.triton.mlstm_rows_gates import (
    mlstm_rows_gate_grad_kernel,
    mlstm_rows_gate_kernel,
)
from moxe_plugin.nn.triton.mlstm_rows_kernels import mlstm_rows_forward_kernel
from moxe_plugin.nn.triton.mlstm_rows_tilings import find_options
from moxe_plugin.nn.triton.sizes import ceil_div

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


MAX_HEAD_DIM = 512
"""Blocks of wider heads would not fit in shared memory."""

_GATE_BLOCK = 256
"""The positions that a program of the gates has at once."""


def mlstm_rows(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, rows: RaggedRows, num_heads: int
) -> Tensor:
    """Run the mLSTM over all segments, each from an empty memory; differentiable once.

    :param q: The queries, of float32, bfloat16 or float16, as k and v are. Head h has
        the channels ``[h*D,(h+1)*D)``. Rows may be farther apart than I. *Shape:*
        ``(C,I)``.
    :param k: The keys. *Shape:* ``(C,I)``.
    :param v: The values. *Shape:* ``(C,I)``.
    :param gates: Logarithms of all heads' input gates, then logits of their forget
        gates, float32. *Shape:* ``(C,2H)``.
    :param rows: Where the rows are.
    :param num_heads: The number of heads H; D is a multiple of 16, 512 at
        most.

    :returns: The outputs ``(C,I)``, in the precision of ``q``.

    :raises ValueError: D or a precision is none of those named.
    """
    if q.dtype not in _DTYPES or gates.dtype != torch.float32:
        raise ValueError(
            f"q must be float32, bfloat16 or float16 and gates float32, but they are "
            f"{q.dtype} and {gates.dtype}."
        )
    if q.size(1) % (16 * num_heads) != 0 or q.size(1) > MAX_HEAD_DIM * num_heads:
        raise ValueError(
            f"The width of a head must be a multiple of 16 up to {MAX_HEAD_DIM}, but "
            f"{num_heads} heads have {q.size(1)} channels."
        )

    return _MLSTMRows.apply(q, k, v, gates, rows, num_heads)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def mlstm_rows_forward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, rows: RaggedRows, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels; see :func:`mlstm_rows`.

    :param q: *Shape:* ``(C,I)``.
    :param k: *Shape:* ``(C,I)``.
    :param v: *Shape:* ``(C,I)``.
    :param gates: *Shape:* ``(C,2H)``.
    :param rows: Where the rows are.
    :param num_heads: The number of heads H.

    :returns: The outputs ``(C,I)``, contiguous, and for the gradient a, A, exp(-m) and
        the denominator ``(4,H,C)``.
    """
    num_rows, width = q.shape
    h = torch.empty(num_rows, width, dtype=q.dtype, device=q.device)
    small = gates.new_empty(4, num_heads, num_rows)
    if num_rows == 0:
        return h, small

    num_segments = rows.begins.size(0) - 1
    mlstm_rows_gate_kernel[(num_segments, num_heads)](
        *(gates, rows.begins, small, gates.stride(0), num_rows, MAX_EXPONENT),
        BLOCK=_GATE_BLOCK,
    )

    head_dim = width // num_heads
    block, options = find_options("forward", q.dtype, head_dim, rows)
    num_blocks = ceil_div(rows.max_len, block)
    mlstm_rows_forward_kernel[(num_segments * num_blocks, num_heads)](
        *(q, k, v, rows.begins, small, h),
        *(q.stride(0), k.stride(0), v.stride(0), width),
        *(num_rows, num_blocks, head_dim**-0.5, NORMALIZER_EPS),
        **options,
    )

    return h, small


def mlstm_rows_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    h: Tensor,
    small: Tensor,
    grad_h: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    rows: RaggedRows,
) -> Tensor:
    """Launch the backward kernels.

    :param q: *Shape:* ``(C,I)``.
    :param k: *Shape:* ``(C,I)``.
    :param v: *Shape:* ``(C,I)``.
    :param gates: *Shape:* ``(C,2H)``.
    :param h: As :func:`mlstm_rows_forward` returned it. *Shape:* ``(C,I)``.
    :param small: As :func:`mlstm_rows_forward` returned it. *Shape:* ``(4,H,C)``.
    :param grad_h: The gradient of ``h``. *Shape:* ``(C,I)``.
    :param grad_q: Gets the gradient of ``q``; rows may be farther apart than I, here
        and below. *Shape:* ``(C,I)``.
    :param grad_k: Gets that of ``k``. *Shape:* ``(C,I)``.
    :param grad_v: Gets that of ``v``. *Shape:* ``(C,I)``.
    :param rows: Where the rows are.

    :returns: The gradient of ``gates``, float32. *Shape:* ``(C,2H)``.
    """
    _, num_heads, num_rows = small.shape
    grad_gates = small.new_empty(num_rows, 2 * num_heads)
    if num_rows == 0:
        return grad_gates

    # The gradients of m and a, and what keys and values need of the norm
    grad_small = torch.empty_like(small)
    head_dim = q.size(1) // num_heads
    num_segments = rows.begins.size(0) - 1

    block, options = find_options("query_grad", q.dtype, head_dim, rows)
    num_blocks = ceil_div(rows.max_len, block)
    mlstm_rows_query_grad_kernel[(num_segments * num_blocks, num_heads)](
        *(k, v, rows.begins, small, h, grad_h, grad_q, grad_small),
        *(k.stride(0), v.stride(0)),
        *(h.stride(0), grad_h.stride(0), grad_q.stride(0)),
        *(num_rows, num_blocks, head_dim**-0.5, NORMALIZER_EPS),
        **options,
    )

    block, options = find_options("key_value_grad", q.dtype, head_dim, rows)
    num_blocks = ceil_div(rows.max_len, block)
    mlstm_rows_key_value_grad_kernel[(num_segments * num_blocks * 2, num_heads)](
        *(q, k, v, rows.begins, small, grad_h, grad_k, grad_v, grad_small),
        *(q.stride(0), k.stride(0), v.stride(0)),
        *(grad_h.stride(0), grad_k.stride(0), grad_v.stride(0)),
        *(num_rows, num_blocks),
        **options,
    )

    mlstm_rows_gate_grad_kernel[(num_segments, num_heads)](
        *(gates, rows.begins, grad_small, grad_gates, gates.stride(0), num_rows),
        BLOCK=_GATE_BLOCK,
    )

    return grad_gates


class _MLSTMRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        rows: RaggedRows,
        num_heads: int,
    ) -> Tensor:
        q, k, v, gates = (with_dense_rows(x) for x in (q, k, v, gates))
        h, small = mlstm_rows_forward(q, k, v, gates, rows, num_heads)

        ctx.save_for_backward(q, k, v, gates, h, small)
        ctx.rows = rows

        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gates, h, small = ctx.saved_tensors
        num_rows, width = q.shape

        grads = q.new_empty(3, num_rows, width).unbind()
        grad_gates = mlstm_rows_backward(
            *(q, k, v, gates, h, small, with_dense_rows(grad_h), *grads, ctx.rows)
        )

        return *grads, grad_gates, None, None
