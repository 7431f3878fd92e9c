"""How the kernels of the chunkwise mLSTM are launched; its formulas are in `.mlstm`.

Programs are counted in one dimension: CUDA has up to 2**31 - 1 of them there, and
65,535 in others. A row's chunk comes after the other, and of a chunk tile after tile,
so that what runs at the same time reads the same q, k and v.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.mlstm_cell import NORMALIZER_EPS
from moxe_plugin.nn.padding import widen

_MIN_BLOCK = 16
"""The least extent of a matrix product in Triton."""


def launch_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    peak: Tensor,
    m_in: Tensor,
    floor: Tensor,
    c0: Tensor,
    n0: Tensor,
    lens: Tensor,
    *,
    has_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs and the last memory; differentiable once.

    :param q: The queries, contiguous, as all tensors are. *Shape:* ``(B,S,D)``.
    :param k: The keys. *Shape:* ``(B,S,D)``.
    :param v: The values. *Shape:* ``(B,S,D)``.
    :param a: ``i - b`` of C chunks, float32 as all that follows. *Shape:* ``(B,C,L)``.
    :param peak: *Shape:* ``(B,C,L)``.
    :param m_in: The incoming stabiliser of each chunk. *Shape:* ``(B,C)``.
    :param floor: ``exp(-m)``. *Shape:* ``(B,C,L)``.
    :param c0: C before the first position. *Shape:* ``(B,D,D)``.
    :param n0: n before the first position. *Shape:* ``(B,D)``.
    :param lens: Where right padding begins, an integer. *Shape:* ``(B)``.
    :param has_memory: Whether ``c0`` and ``n0`` are not all 0.

    :returns: The outputs ``(B,S,D)``, and C and n after the last position.
    """
    return _Chunkwise.apply(  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped
        q, k, v, a, peak, m_in, floor, c0, n0, lens, has_memory
    )


class _Chunkwise(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        peak: Tensor,
        m_in: Tensor,
        floor: Tensor,
        c0: Tensor,
        n0: Tensor,
        lens: Tensor,
        has_memory: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from moxe_plugin.nn.triton.mlstm_forward import output_kernel, state_kernel

        num_rows, seq_len, dim = q.shape
        num_chunks, num_tiles, tiling = a.size(1), *_tiling(q, a.size(2))
        kept, added, decay = _weights(a, peak, m_in, dim)
        c = q.new_empty(num_rows, num_chunks, dim, dim)
        n = c0.new_empty(num_rows, num_chunks, dim)
        last_c, last_n = torch.empty_like(c0), torch.empty_like(n0)
        h, denominator = torch.empty_like(q), torch.zeros_like(a)

        state_kernel[(num_rows * num_tiles**2,)](
            *(k, v, added, decay, lens, c0, n0, c, n, last_c, last_n),
            *(seq_len, num_chunks),
            **tiling,
            HAS_MEMORY=has_memory,
        )
        output_kernel[(num_rows * num_chunks * num_tiles,)](
            *(q, k, v, a, peak, kept, floor, lens, c, n, h, denominator),
            *(seq_len, num_chunks, dim**-0.5, NORMALIZER_EPS),
            **tiling,
        )
        ctx.save_for_backward(
            *(q, k, v, a, peak, m_in, floor, lens, c, n),
            *(last_c, last_n, h, denominator),
        )

        return h, last_c, last_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from moxe_plugin.nn.triton.mlstm_backward import (
            query_key_grad_kernel,
            state_grad_kernel,
            value_grad_kernel,
        )

        q, k, v, a, peak, m_in, floor, lens, c, n = ctx.saved_tensors[:10]
        last_c, last_n, h, denominator = ctx.saved_tensors[10:]
        grad_h, grad_last_c, grad_last_n = (x.contiguous() for x in grads)
        num_rows, seq_len, dim = q.shape
        num_chunks, num_tiles, tiling = a.size(1), *_tiling(q, a.size(2))
        kept, added, decay = _weights(a, peak, m_in, dim)

        inverse = 1 / (torch.maximum(denominator.abs(), floor) + NORMALIZER_EPS)
        along = torch.linalg.vecdot(widen(grad_h), widen(h))
        grad_norm = F.pad(-along, (0, a[0].numel() - seq_len)).view_as(a) * inverse
        is_floor = floor >= denominator.abs()
        grad_floor = torch.where(is_floor, grad_norm, 0)
        grad_den = torch.where(is_floor, 0, grad_norm * denominator.sign())

        grad_c, grad_n = torch.empty_like(c), torch.empty_like(n)
        grad_c0, grad_n0 = torch.empty_like(last_c), torch.empty_like(last_n)
        overlap = a.new_zeros(num_rows, num_chunks + 1, num_tiles**2)
        state_grad_kernel[(num_rows * num_tiles**2,)](
            *(q, grad_h, kept, inverse, grad_den, decay, lens, c, n, last_c, last_n),
            *(grad_last_c, grad_last_n, grad_c, grad_n, grad_c0, grad_n0, overlap),
            *(seq_len, num_chunks),
            **tiling,
        )

        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        q_overlap, k_overlap = (a.new_zeros(*a.shape, num_tiles) for _ in range(2))
        query_key_grad_kernel[(num_rows * num_chunks * num_tiles,)](
            *(q, k, v, grad_h, a, peak, kept, added, inverse, grad_den, lens),
            *(c, n, grad_c, grad_n, grad_q, grad_k, q_overlap, k_overlap),
            *(seq_len, num_chunks, dim**-0.5),
            **tiling,
        )
        value_grad_kernel[(num_rows * num_chunks * num_tiles,)](
            *(q, k, grad_h, a, peak, added, inverse, lens, grad_c, grad_v),
            *(seq_len, num_chunks, dim**-0.5),
            **tiling,
        )

        overlap = overlap.sum(-1)
        grad_peak = -q_overlap.sum(-1)
        grad_peak[..., -1] -= overlap[:, 1:]
        # What follows a row's last chunk is no chunk of it.
        starts = torch.arange(num_chunks, device=q.device) * a.size(2)
        grad_m_in = torch.where(starts < lens[:, None], overlap[:, :-1], 0)
        grad_gates = (k_overlap.sum(-1), grad_peak, grad_m_in, grad_floor)

        return (grad_q, grad_k, grad_v, *grad_gates, grad_c0, grad_n0, None, None)


def _weights(
    a: Tensor, peak: Tensor, m_in: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    last = peak[..., -1:]

    return (
        torch.exp(m_in[..., None] - peak),
        torch.exp(a - last) * dim**-0.5,
        torch.exp(m_in[..., None] - last),
    )


def _tiling(q: Tensor, chunk_size: int) -> tuple[int, dict[str, Any]]:
    dim = q.size(-1)
    largest = 32 if q.dtype == torch.float32 else 64
    block_dim = min(largest, max(_MIN_BLOCK, 1 << (dim - 1).bit_length()))
    block_len = max(_MIN_BLOCK, 1 << (chunk_size - 1).bit_length())
    tiling = {
        "D": dim,
        "L": chunk_size,
        "BLOCK_L": block_len,
        "BLOCK_D": block_dim,
        "WIDE": _is_interpreted() and q.dtype == torch.bfloat16,
        "num_warps": 8,
    }

    return -(-dim // block_dim), tiling


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
