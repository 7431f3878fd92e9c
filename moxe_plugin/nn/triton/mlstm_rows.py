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

from functools import lru_cache
from typing import Any, NamedTuple

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
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two
from moxe_plugin.nn.triton.tile_products import find_precision, is_interpreted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiling(NamedTuple):
    """How the work of a kernel is cut."""

    block_t: int
    """The queries of a block."""

    block_s: int
    """The keys of a block."""

    block_d: int
    """The width of a tile; a head has as many as it needs."""

    num_warps: int
    num_stages: int


HALF_TILINGS = {
    "forward": Tiling(64, 32, 64, 4, 2),
    "query_grad": Tiling(64, 32, 64, 4, 2),
    "key_value_grad": Tiling(32, 64, 64, 4, 2),
}
"""For bfloat16 and float16."""

SHORT_HALF_TILINGS = HALF_TILINGS | {
    "forward": Tiling(64, 64, 64, 4, 1),
    "query_grad": Tiling(64, 64, 64, 4, 1),
}
"""The same for segments of up to ``SHORT_LEN``, with few blocks of keys to a query: one
larger block is faster than two of which the second is asked for during the first."""

SHORT_LEN = 128
"""The longest segments that take ``SHORT_HALF_TILINGS``."""

FLOAT_TILINGS = {
    "forward": Tiling(32, 32, 32, 8, 1),
    "query_grad": Tiling(32, 32, 32, 8, 1),
    "key_value_grad": Tiling(32, 32, 32, 8, 1),
}
"""For float32, whose tiles take twice the space."""

TF32_TILINGS = {
    "forward": Tiling(32, 32, 64, 4, 1),
    "query_grad": Tiling(32, 32, 64, 4, 1),
    "key_value_grad": Tiling(32, 32, 64, 4, 1),
}
"""For float32 that tensor cores may round: other tiles would not fit in registers."""

MAX_HEAD_DIM = 512
"""Blocks of wider heads would not fit in shared memory."""

_WIDE_HEAD_DIM = 320
"""Blocks of wider heads do not fit in the registers of fewer than 8 warps."""

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
    block, options = _options("forward", q.dtype, head_dim, rows)
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

    block, options = _options("query_grad", q.dtype, head_dim, rows)
    num_blocks = ceil_div(rows.max_len, block)
    mlstm_rows_query_grad_kernel[(num_segments * num_blocks, num_heads)](
        *(k, v, rows.begins, small, h, grad_h, grad_q, grad_small),
        *(k.stride(0), v.stride(0)),
        *(h.stride(0), grad_h.stride(0), grad_q.stride(0)),
        *(num_rows, num_blocks, head_dim**-0.5, NORMALIZER_EPS),
        **options,
    )

    block, options = _options("key_value_grad", q.dtype, head_dim, rows)
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

        grad = torch.empty(num_rows, 3 * width, dtype=q.dtype, device=q.device)
        grads = grad.split(width, dim=1)
        grad_gates = mlstm_rows_backward(
            *(q, k, v, gates, h, small, with_dense_rows(grad_h), *grads, ctx.rows)
        )

        return *grads, grad_gates, None, None


def _options(
    kernel: str, dtype: torch.dtype, head_dim: int, rows: RaggedRows
) -> tuple[int, dict[str, Any]]:
    """Return the number of a program's own positions, and a launch's options."""
    is_short = rows.max_len <= SHORT_LEN

    return _cached_options(kernel, dtype, head_dim, is_short, find_precision(dtype))


@lru_cache(maxsize=64)
def _cached_options(
    kernel: str, dtype: torch.dtype, head_dim: int, is_short: bool, precision: str
) -> tuple[int, dict[str, Any]]:
    if dtype != torch.float32:
        tiling = (SHORT_HALF_TILINGS if is_short else HALF_TILINGS)[kernel]
    else:
        tiling = (FLOAT_TILINGS if precision == "ieee" else TF32_TILINGS)[kernel]
    num_warps = 8 if head_dim > _WIDE_HEAD_DIM else tiling.num_warps
    own = tiling.block_s if kernel == "key_value_grad" else tiling.block_t

    return own, {
        "D": head_dim,
        "BLOCK_T": tiling.block_t,
        "BLOCK_S": tiling.block_s,
        "BLOCK_D": min(tiling.block_d, power_of_two(head_dim)),
        "INTERPRETED": is_interpreted(),
        "PRECISION": precision,
        "num_warps": num_warps,
        "num_stages": tiling.num_stages,
    }
