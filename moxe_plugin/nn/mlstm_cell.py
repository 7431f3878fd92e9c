"""The mLSTM cell: one step (the reference), a whole sequence, and chunk by chunk.

Matrix memory with exponential input gate and sigmoid forget gate (xLSTM, arXiv
2405.04517, eqs. (19)-(27)). Leading dimensions, written ``…``, are free: a block uses
``([E,]N,H)``. Gates, stabilisers and states are float32, or float64 for float64 inputs;
products with q, k and v run in their own precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moxe_plugin.nn.padding import EMPTY, close_gates, valid_positions, widen
from moxe_plugin.nn.products import matmul

NORMALIZER_EPS = 1e-6

MAX_EXPONENT = 80.0
"""Above it ``exp(-m)`` is not computed further: the output is 0 to 1e-34 anyway, and
float32 ends at ``exp(88)``."""


class MLSTMMemory(NamedTuple):
    """The memory of mLSTM cells; without stabiliser: ``exp(m) * c``, ``exp(m) * n``."""

    c: Tensor
    """Decayed sum of ``k v^T / sqrt(D)``. *Shape:* ``(…,D,D)``, key first."""

    n: Tensor
    """Decayed sum of ``k / sqrt(D)``. *Shape:* ``(…,D)``."""

    m: Tensor
    """The stabiliser, a logarithm; ``EMPTY`` at first. *Shape:* ``(…)``."""


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_preact: Tensor,
    forget_preact: Tensor,
    memory: MLSTMMemory,
) -> tuple[Tensor, MLSTMMemory]:
    """Advance the cell by one position.

    The primes mark what ``memory`` holds::

        m = max(logsigmoid(f) + m', i)
        c = exp(logsigmoid(f) + m' - m) c' + exp(i - m) k v^T / sqrt(D)
        n = exp(logsigmoid(f) + m' - m) n' + exp(i - m) k / sqrt(D)
        h = q c / (max(|q n|, exp(-m)) + 1e-6)

    :param q: The query. *Shape:* ``(…,D)``.
    :param k: The key. *Shape:* ``(…,D)``.
    :param v: The value. *Shape:* ``(…,D)``.
    :param input_preact: Logarithm of the input gate. *Shape:* ``(…)``.
    :param forget_preact: Logit of the forget gate. *Shape:* ``(…)``.
    :param memory: The memory before this position.

    :returns: The output ``h`` ``(…,D)`` and the memory after this position.
    """
    input_preact, forget_preact = widen(input_preact), widen(forget_preact)

    log_kept = F.logsigmoid(forget_preact) + memory.m
    m = torch.maximum(log_kept, input_preact)
    kept = torch.exp(log_kept - m)
    added = widen(k) * (torch.exp(input_preact - m) / math.sqrt(k.size(-1)))[..., None]

    c = torch.addcmul(
        kept[..., None, None] * memory.c, added[..., None], widen(v)[..., None, :]
    )
    n = kept[..., None] * memory.n + added

    numerator = (widen(q)[..., None, :] @ c).squeeze(-2)
    h = numerator / _normalizer((widen(q) * n).sum(-1), m)[..., None]

    return h.to(v.dtype), MLSTMMemory(c, n, m)


def mlstm_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_preact: Tensor,
    forget_preact: Tensor,
    memory: MLSTMMemory | None = None,
    seq_lens: Tensor | None = None,
    *,
    return_memory: bool = True,
) -> tuple[Tensor, MLSTMMemory | None]:
    """Compute all positions at once, in time and space quadratic in S.

    With ``F_t`` the sum of ``logsigmoid(f)`` up to t, ``a_s = i_s - F_s`` and ``A_t =
    max(m_0, a_1, …, a_t)`` the stabiliser of :func:`mlstm_step` is ``m_t = F_t + A_t``,
    and key s weighs ``exp(a_s - A_t)`` at position t: ``F_t`` cancels.

    :param q: The queries. *Shape:* ``(…,S,D)``.
    :param k: The keys. *Shape:* ``(…,S,D)``.
    :param v: The values. *Shape:* ``(…,S,D)``.
    :param input_preact: Logarithm of the input gates. *Shape:* ``(…,S)``.
    :param forget_preact: Logits of the forget gates. *Shape:* ``(…,S)``.
    :param memory: The memory before the first position; ``None`` if empty.
    :param seq_lens: Where right padding begins: it leaves the memory as it is. ``None``
        without padding. *Shape:* ``(…)``, size 1 where it broadcasts.
    :param return_memory: Whether to compute the memory after the last position.

    :returns: The outputs ``(…,S,D)`` and the memory, or ``None``.
    """
    input_preact, forget_preact = widen(input_preact), widen(forget_preact)

    if seq_lens is not None:
        valid = valid_positions(seq_lens, q.size(-2))
        input_preact, forget_preact = close_gates(input_preact, forget_preact, valid)

    k = k / math.sqrt(k.size(-1))

    log_decay = F.logsigmoid(forget_preact).cumsum(-1)
    log_weight = input_preact - log_decay
    peak = log_weight.cummax(-1).values
    if memory is None:
        # Keeps the weight of padding at 0 where nothing but padding has been.
        peak = peak.clamp(min=EMPTY)
    else:
        peak = torch.maximum(peak, memory.m[..., None])
    m = log_decay + peak

    # (…,S) -> (…,S,S); masked before exp, which could overflow above the diagonal
    future = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool, device=q.device).triu(
        1
    )
    log_weights = log_weight[..., None, :] - peak[..., None]
    weights = torch.exp(log_weights.masked_fill(future, EMPTY)) * matmul(q, k.mT)

    numerator = matmul(weights.to(v.dtype), v)
    denominator = weights.sum(-1)

    if memory is not None:
        kept = torch.exp(memory.m[..., None] - peak)
        numerator = numerator + kept[..., None] * matmul(q, memory.c.to(q.dtype))
        from_memory = (q @ memory.n[..., None].to(q.dtype)).squeeze(-1)
        denominator = denominator + kept * from_memory

    h = (numerator / _normalizer(denominator, m)[..., None]).to(v.dtype)

    if not return_memory:
        return h, None

    if q.size(-2) == 0:
        return h, _empty_memory(k) if memory is None else memory

    # How each key is weighed after the last position.
    added = k * torch.exp(log_weight - peak[..., -1:])[..., None].to(k.dtype)
    c, n = widen(matmul(added.mT, v)), widen(added).sum(-2)

    if memory is not None:
        c = c + kept[..., -1:, None] * memory.c
        n = n + kept[..., -1:] * memory.n

    return h, MLSTMMemory(c, n, m[..., -1])


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
    """Fold :func:`mlstm_parallel` over chunks, in time and space linear in S.

    :param q: The queries. *Shape:* ``(…,S,D)``.
    :param k: The keys. *Shape:* ``(…,S,D)``.
    :param v: The values. *Shape:* ``(…,S,D)``.
    :param input_preact: Logarithm of the input gates. *Shape:* ``(…,S)``.
    :param forget_preact: Logits of the forget gates. *Shape:* ``(…,S)``.
    :param memory: The memory before the first position; ``None`` if empty.
    :param seq_lens: As in :func:`mlstm_parallel`.
    :param chunk_size: The number of positions of a chunk; the last may be shorter.
    :param return_memory: Whether to compute the memory after the last position.

    :returns: The outputs ``(…,S,D)`` and the memory, or ``None``.
    """
    # split, not slices: its backward writes each gradient once.
    vectors = [x.split(chunk_size, dim=-2) for x in (q, k, v)]
    gates = [x.split(chunk_size, dim=-1) for x in (input_preact, forget_preact)]
    outputs = []
    num_left = q.size(-2)

    for q, k, v, i, f in zip(*vectors, *gates, strict=True):
        num_left -= chunk_size
        output, memory = mlstm_parallel(
            *(q, k, v, i, f, memory, seq_lens),
            return_memory=return_memory or num_left > 0,
        )
        outputs.append(output)
        seq_lens = None if seq_lens is None else seq_lens - chunk_size

    return torch.cat(outputs, dim=-2), memory


def best_chunk_size(seq_len: int, head_dim: int) -> int:
    """Choose the chunk size with the least work, S itself for the parallel form.

    A position costs about ``L * (2 D + 32)`` multiply-adds within a chunk of length L
    (32 stands for the elementwise work on a pair of positions) and, if there is more
    than one chunk, ``2 D**2`` to read and to write the memory.

    :param seq_len: The sequence length S.
    :param head_dim: The width D of a head.

    :returns: 64 or S.
    """
    chunk_size = 64
    pair_cost = 2 * head_dim + 32

    if seq_len * pair_cost <= chunk_size * pair_cost + 2 * head_dim**2:
        return seq_len

    return chunk_size


def _empty_memory(k: Tensor) -> MLSTMMemory:
    *rows, _, dim = k.shape
    zeros = widen(k.new_zeros(*rows, dim, dim))

    return MLSTMMemory(zeros, zeros[..., 0], zeros[..., 0, 0] + EMPTY)


def _normalizer(denominator: Tensor, m: Tensor) -> Tensor:
    floor = torch.exp((-m).clamp(max=MAX_EXPONENT))

    return torch.maximum(denominator.abs(), floor) + NORMALIZER_EPS
