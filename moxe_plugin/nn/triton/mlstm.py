"""The chunkwise mLSTM in Triton, with the signature of its torch reference.

Small tensors ``(…,S)`` are torch and autograd; kernels do all of size ``(…,S,D)`` and
``(…,D,D)``. In a chunk of L positions let ``b`` be the running sum of
``logsigmoid(f)``, ``a = i - b``, ``m'`` the incoming stabiliser, ``peak_t = max(m',
a_1, …, a_t)``, ``kept = exp(m' - peak)``, ``decay = exp(m' - peak_L)`` and ``added =
exp(a - peak_L) / sqrt(D)``. Then, with primes for the chunk's incoming state::

    P_ts = exp(a_s - peak_t) q_t k_s / sqrt(D) for s <= t, else 0
    h = (P v + kept q C') / norm;  norm = max(|P 1 + kept q n'|, exp(-m)) + 1e-6
    C = decay C' + (added k)^T v;  n = decay n' + sum of added k

Backward, every weight is an exponential, so the gradients of exponents are products
that are there anyway: ``da = k dk``, ``dpeak = -q dq`` (and ``-<dC, C> - <dn, n>`` at
the chunk's last position), ``dm' = <dC', C'> + <dn', n'>``.

Arithmetic, not a measurement, for one chunk and head with D = 320, L = 64 in bf16: the
forward kernels do ``4 L D² + 4 L² D`` FLOPs on distinct tensors, 31 million, and write
and read one state, ``2 · 2 D²`` bytes, and ``q, k, v, h``, ``2 · 6 L D``: 0.66 MB if
the cache serves repeated reads. That is 48 FLOPs per byte, where an H100 balances at
about 295 (989 TFLOP/s, 3.35 TB/s): bound by memory, 0.2 µs per chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from moxe_plugin.nn.mlstm_cell import _MAX_EXPONENT, NORMALIZER_EPS, MLSTMMemory
from moxe_plugin.nn.padding import EMPTY, close_gates, valid_positions, widen

MAX_CHUNK_SIZE = 64
"""Tiles of ``(L,L)`` and ``(L,D)`` of longer chunks do not fit into registers."""

_MIN_BLOCK = 16
"""The least extent of a matrix product in Triton."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_preact: Tensor,
    forget_preact: Tensor,
    memory: MLSTMMemory | None = None,
    seq_lens: Tensor | None = None,
    *,
    chunk_size: int,
    return_memory: bool = True,
) -> tuple[Tensor, MLSTMMemory | None]:
    """Compute :func:`moxe_plugin.nn.mlstm_cell.mlstm_chunkwise` in Triton.

    Chunks after the end of a row cost nothing, and outputs at padding are 0.

    :param q: The queries. *Shape:* ``(…,S,D)``.
    :param k: The keys. *Shape:* ``(…,S,D)``.
    :param v: The values. *Shape:* ``(…,S,D)``.
    :param input_preact: Logarithm of the input gates. *Shape:* ``(…,S)``.
    :param forget_preact: Logits of the forget gates. *Shape:* ``(…,S)``.
    :param memory: The memory before the first position; ``None`` if empty.
    :param seq_lens: Where right padding begins: it leaves the memory as it is. ``None``
        without padding. *Shape:* ``(…)``, size 1 where it broadcasts.
    :param chunk_size: The number of positions of a chunk, from 1 to 64.
    :param return_memory: Whether to return the memory after the last position.

    :returns: The outputs ``(…,S,D)`` and the memory, or ``None``.

    :raises ValueError: The chunk size is out of range, or q, k and v are not all in the
        same one of float32, bfloat16 and float16.
    """
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise ValueError(
            f"`chunk_size` must be from 1 to {MAX_CHUNK_SIZE} for the Triton kernels, "
            f"but is {chunk_size} instead."
        )

    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "`q`, `k` and `v` must all be float32, bfloat16 or float16 for the Triton "
            f"kernels, but are {q.dtype}, {k.dtype} and {v.dtype} instead; use the "
            "backend 'torch' for others."
        )

    lead, (seq_len, dim) = q.shape[:-2], q.shape[-2:]
    num_rows = math.prod(lead)

    if seq_lens is None:
        lens = torch.full((num_rows,), seq_len, device=q.device)
    else:
        lens = seq_lens.broadcast_to(lead).reshape(num_rows).clamp(0, seq_len)

    if memory is None:
        c, n = (
            q.new_zeros(num_rows, *s, dtype=torch.float32) for s in ((dim, dim), (dim,))
        )
        m = c.new_full((num_rows,), EMPTY)
    else:
        c, n, m = (
            x.float()
            .broadcast_to(*lead, *x.shape[x.ndim - size :])
            .flatten(0, len(lead) - 1)
            for x, size in zip(memory, (2, 1, 0), strict=True)
        )

    num_chunks = -(-seq_len // chunk_size)
    i, f = (
        F.pad(
            widen(x).reshape(num_rows, seq_len), (0, num_chunks * chunk_size - seq_len)
        )
        for x in (input_preact, forget_preact)
    )
    a, peak, m_in, m_out, m_all = _stabilise(i, f, lens, m, chunk_size)
    floor = torch.exp((-m_all).clamp(max=_MAX_EXPONENT))

    flat = (x.reshape(num_rows, seq_len, dim).contiguous() for x in (q, k, v))
    h, c, n = _Chunkwise.apply(  # type: ignore[no-untyped-call]
        *flat,
        a,
        peak,
        m_in,
        floor,
        c.contiguous(),
        n.contiguous(),
        lens,
        memory is not None,
    )
    h = h.reshape(q.shape)

    if not return_memory:
        return h, None

    return h, MLSTMMemory(
        c.reshape(*lead, dim, dim), n.reshape(*lead, dim), m_out.reshape(lead)
    )


def _stabilise(
    input_preact: Tensor,
    forget_preact: Tensor,
    lens: Tensor,
    m: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    valid = valid_positions(lens, input_preact.size(-1))
    i, f = (
        x.unflatten(-1, (-1, chunk_size))
        for x in close_gates(input_preact, forget_preact, valid)
    )
    # (B,C,L), sums within a chunk only: they stay small
    b = F.logsigmoid(f).cumsum(-1)
    a = i - b
    highest = a.cummax(-1).values

    before = []
    for last_b, last_highest in zip(
        b[..., -1].unbind(-1), highest[..., -1].unbind(-1), strict=True
    ):
        before.append(m)
        m = last_b + torch.maximum(last_highest, m)

    m_in = torch.stack(before, dim=-1)
    peak = torch.maximum(highest, m_in[..., None])

    return a, peak, m_in, m, b + peak


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
        num_chunks, tiling, tiles = a.size(1), *_tiling(q, a.size(2))
        kept, added, decay = _weights(a, peak, m_in, dim)
        c = q.new_empty(num_rows, num_chunks, dim, dim)
        n = c0.new_empty(num_rows, num_chunks, dim)
        last_c, last_n = torch.empty_like(c0), torch.empty_like(n0)
        h, denominator = torch.empty_like(q), torch.zeros_like(a)

        state_kernel[(tiles, tiles, num_rows)](
            *(k, v, added, decay, lens, c0, n0, c, n, last_c, last_n),
            *(seq_len, num_chunks),
            **tiling,
            HAS_MEMORY=has_memory,
        )
        output_kernel[(tiles, num_chunks, num_rows)](
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
        num_chunks, tiling, tiles = a.size(1), *_tiling(q, a.size(2))
        kept, added, decay = _weights(a, peak, m_in, dim)

        inverse = 1 / (torch.maximum(denominator.abs(), floor) + NORMALIZER_EPS)
        along = torch.linalg.vecdot(widen(grad_h), widen(h))
        grad_norm = F.pad(-along, (0, a[0].numel() - seq_len)).view_as(a) * inverse
        is_floor = floor >= denominator.abs()
        grad_floor = torch.where(is_floor, grad_norm, 0)
        grad_den = torch.where(is_floor, 0, grad_norm * denominator.sign())

        grad_c, grad_n = torch.empty_like(c), torch.empty_like(n)
        grad_c0, grad_n0 = torch.empty_like(last_c), torch.empty_like(last_n)
        overlap = a.new_zeros(num_rows, num_chunks + 1, tiles**2)
        state_grad_kernel[(tiles, tiles, num_rows)](
            *(q, grad_h, kept, inverse, grad_den, decay, lens, c, n, last_c, last_n),
            *(grad_last_c, grad_last_n, grad_c, grad_n, grad_c0, grad_n0, overlap),
            *(seq_len, num_chunks, tiles**2),
            **tiling,
        )

        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        q_overlap, k_overlap = (a.new_zeros(*a.shape, tiles) for _ in range(2))
        query_key_grad_kernel[(tiles, num_chunks, num_rows)](
            *(q, k, v, grad_h, a, peak, kept, added, inverse, grad_den, lens),
            *(c, n, grad_c, grad_n, grad_q, grad_k, q_overlap, k_overlap),
            *(seq_len, num_chunks, dim**-0.5),
            **tiling,
        )
        value_grad_kernel[(tiles, num_chunks, num_rows)](
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


def _tiling(q: Tensor, chunk_size: int) -> tuple[dict[str, Any], int]:
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

    return tiling, -(-dim // block_dim)


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
