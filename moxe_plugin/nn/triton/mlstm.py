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

import torch
import torch.nn.functional as F
from torch import Tensor

from moxe_plugin.nn.mlstm_cell import MAX_EXPONENT, MLSTMMemory
from moxe_plugin.nn.padding import EMPTY, close_gates, valid_positions, widen
from moxe_plugin.nn.triton.mlstm_launch import launch_chunkwise

MAX_CHUNK_SIZE = 64
"""Tiles of ``(L,L)`` and ``(L,D)`` of longer chunks do not fit into registers."""

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

    # No position is one chunk of padding, which keeps the memory.
    num_chunks = max(1, -(-seq_len // chunk_size))
    i, f = (
        F.pad(
            widen(x).reshape(num_rows, seq_len), (0, num_chunks * chunk_size - seq_len)
        )
        for x in (input_preact, forget_preact)
    )
    a, peak, m_in, m_out, m_all = _stabilise(i, f, lens, m, chunk_size)
    floor = torch.exp((-m_all).clamp(max=MAX_EXPONENT))

    q_flat, k_flat, v_flat = (
        x.reshape(num_rows, seq_len, dim).contiguous() for x in (q, k, v)
    )
    h, c, n = launch_chunkwise(
        q_flat,
        k_flat,
        v_flat,
        a,
        peak,
        m_in,
        floor,
        c.contiguous(),
        n.contiguous(),
        lens,
        has_memory=memory is not None,
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
