"""How the mLSTM block runs its cell: over a batch, or over rows without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.backend import ScanBackend, check_backend, resolve_backend
from moxe_plugin.nn.buckets import find_buckets, from_buckets, to_buckets
from moxe_plugin.nn.mlstm_cell import (
    MAX_EXPONENT,
    NORMALIZER_EPS,
    MLSTMMemory,
    best_chunk_size,
    mlstm_chunkwise,
    mlstm_step,
)
from moxe_plugin.nn.native.causal_squares import Sequences
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.mlstm_chunkwise import MLSTMChunkwiseForm
from moxe_plugin.nn.native.mlstm_forms import MLSTMForm, NormalizerLimits, run_form
from moxe_plugin.nn.native.mlstm_parallel import MLSTMParallelForm
from moxe_plugin.nn.passes import widen_for_native
from moxe_plugin.nn.products import runs_native
from moxe_plugin.nn.rows import Rows

_LARGE_HEAD_DIM: Final = 256

_NATIVE_CHUNK_SIZE: Final = 128


class MLSTMState(NamedTuple):
    """What an mLSTM block remembers of a sequence. I is the block's inner width."""

    conv: Tensor
    """The last inputs of the causal convolution. *Shape:* ``([E,]N,K-1,I)``."""

    c: Tensor
    """See :class:`MLSTMMemory`; float32 or float64. *Shape:* ``([E,]N,H,D,D)``."""

    n: Tensor
    """See :class:`MLSTMMemory`. *Shape:* ``([E,]N,H,D)``."""

    m: Tensor
    """See :class:`MLSTMMemory`. *Shape:* ``([E,]N,H)``."""


class MLSTMCellInputs(NamedTuple):
    """What the cell reads: a batch ``([E,]N,S,…)``, or rows ``(C,…)``."""

    q: Tensor
    """The queries of all heads. *Shape:* ``(…,I)``."""

    k: Tensor
    """The keys. *Shape:* ``(…,I)``."""

    v: Tensor
    """The values. *Shape:* ``(…,I)``."""

    gates: Tensor
    """The pre-activations of the input gates, then those of the forget gates. *Shape:*
    ``(…,2H)``."""


class MLSTMRecurrence(NamedTuple):
    """The cell of a block; it has no parameters."""

    num_heads: int
    """The number of heads H."""

    backend: ScanBackend
    """What computes it: see :mod:`moxe_plugin.nn.backend`. With ``triton`` it is torch,
    as with ``torch``: what has kernels, a whole block in training or for one token,
    does not get here.
    """

    def apply(
        self,
        inputs: MLSTMCellInputs,
        seq_lens: Tensor | None,
        memory: MLSTMMemory | None,
        *,
        return_memory: bool,
    ) -> tuple[Tensor, MLSTMMemory | None]:
        """Run the cell over a batch.

        :param inputs: What it reads, ``([E,]N,S,…)``.
        :param seq_lens: Where right padding begins; ``None`` without padding. *Shape:*
            ``([E,]N)``.
        :param memory: The memory before the first position; ``None`` if empty.
        :param return_memory: Whether to compute the memory after the last one.

        :returns: The outputs ``([E,]N,S,I)`` and the memory, or ``None``.

        :raises ValueError: As :func:`~moxe_plugin.nn.backend.resolve_backend`.
        :raises TritonMissingError: As there.
        """
        seq_len = inputs.q.size(-2)

        if memory is None and not return_memory:
            form = self.find_form(
                [*inputs], list_sequences(inputs.q.shape[:-1], seq_lens)
            )
            if form is not None:
                flat = MLSTMCellInputs(*(x.flatten(0, -2) for x in inputs))

                return self._run(form, flat).view(inputs.q.shape), None

        # ([E,]N,S,2H) -> two of ([E,]N,H,S)
        input_preact, forget_preact = inputs.gates.mT.chunk(2, dim=-2)
        # ([E,]N,S,I) -> ([E,]N,H,S,D), contiguous as they enter several products
        q, k, v = (
            torch.unflatten(x, -1, (self.num_heads, -1)).transpose(-3, -2).contiguous()
            for x in inputs[:3]
        )

        if seq_lens is not None:
            seq_lens = seq_lens.unsqueeze(-1)

        check_backend(self.backend)

        if self.backend == "triton":
            # A mistake is an error here, too, where there is no kernel.
            resolve_backend(self.backend, q)

        if seq_len == 1 and seq_lens is None and memory is not None:
            # Fewer operations than whole sequences take, and passes over the memory.
            out, memory = mlstm_step(
                q.squeeze(-2),
                k.squeeze(-2),
                v.squeeze(-2),
                input_preact.squeeze(-1),
                forget_preact.squeeze(-1),
                memory,
            )

            # ([E,]N,H,D) -> ([E,]N,1,I)
            return out.flatten(-2).unsqueeze(-2), memory if return_memory else None

        out, memory = mlstm_chunkwise(
            q,
            k,
            v,
            input_preact,
            forget_preact,
            memory,
            seq_lens,
            chunk_size=_chunk_size(q),
            return_memory=return_memory,
        )

        return out.transpose(-3, -2).flatten(-2), memory

    def apply_to_rows(
        self,
        inputs: MLSTMCellInputs,
        rows: Rows,
        memory: MLSTMMemory | None,
        *,
        return_memory: bool,
    ) -> tuple[Tensor, MLSTMMemory | None]:
        """Run the cell over sub-sequences, those of similar length together.

        :param inputs: What it reads, ``(C,…)``.
        :param rows: The sub-sequences.
        :param memory: The memory before each; needed if one is to be returned. *Shape:*
            ``(E,N,…)``.
        :param return_memory: Whether to return the memory after each.

        :returns: The outputs ``(C,I)`` and the memory, or ``None``. A sub-sequence of
            length 0 keeps its memory exactly.
        """
        assert memory is not None or not return_memory

        if memory is None:
            form = self.find_form([*inputs], follow_each_other(rows.seq_lens))
            if form is not None:
                return self._run(form, inputs), None

        buckets = find_buckets(rows)

        if not buckets.shapes:
            # No row, but all parameters get a (zero) gradient.
            q, k, v, gates = inputs

            return q + k + v + gates.sum(), memory if return_memory else None

        # (E,N,…) -> (E*N,…)
        memories = None if memory is None else [x.flatten(0, 1) for x in memory]
        outputs, afters = [], []

        for segments, seq_lens, *parts in zip(
            buckets.segments,
            buckets.seq_lens,
            *(to_buckets(x, buckets) for x in inputs),
            strict=True,
        ):
            before = None
            if memories is not None:
                before = MLSTMMemory(*(x[segments] for x in memories))

            output, after = self.apply(
                MLSTMCellInputs(*parts), seq_lens, before, return_memory=return_memory
            )
            outputs.append(output)

            afters.append(after)

        hidden = from_buckets(outputs, buckets)

        if memory is None or memories is None or not return_memory:
            return hidden, None

        # Those of length 0 keep what they have.
        segments = torch.cat(buckets.segments)
        memories = [
            x.index_copy(0, segments, torch.cat(y))
            for x, *y in zip(memories, *(a for a in afters if a), strict=True)
        ]

        # (E*N,…) -> (E,N,…)
        return hidden, MLSTMMemory(
            *(x.view_as(y) for x, y in zip(memories, memory, strict=True))
        )

    def find_form(
        self, inputs: Sequence[Tensor], seqs: Callable[[], Sequences]
    ) -> MLSTMForm | None:
        """Choose what runs the cell in C++, from an empty memory and to none.

        :param inputs: What is read; the width of the first is I.
        :param seqs: Finds the sequences; called only if it may be C++.

        :returns: The form, or ``None`` if it is not C++.
        """
        if self.backend not in ("auto", "native") or not runs_native(
            *(widen_for_native(x[:0]) for x in inputs), mixes=True
        ):
            return None

        return self.choose_form(inputs[0].size(-1) // self.num_heads, seqs)

    def choose_form(
        self, head_dim: int, seqs: Callable[[], Sequences]
    ) -> MLSTMForm | None:
        """Choose what runs the cell in C++ where products are C++.

        :param head_dim: The width of a head.
        :param seqs: Finds the sequences.

        :returns: The form, or ``None`` if there is no row or it cannot be compiled.
        """
        found = seqs()
        max_len = max(found.lens, default=0)

        # As measured with heads of 64, 128 and 320: a memory costs a position as much
        # as the keys of twice a head's width.
        is_short = max_len <= 2 * head_dim + _NATIVE_CHUNK_SIZE

        if max_len == 0 or why_not_loaded(
            "mlstm_parallel" if is_short else "mlstm_chunkwise"
        ):
            return None

        limits = NormalizerLimits(MAX_EXPONENT, NORMALIZER_EPS)

        if is_short:
            return MLSTMParallelForm(found, self.num_heads, limits)

        return MLSTMChunkwiseForm(found, self.num_heads, limits, _NATIVE_CHUNK_SIZE)

    def _run(self, form: MLSTMForm, inputs: MLSTMCellInputs) -> Tensor:
        q, k, v = (
            torch.unflatten(widen_for_native(x), -1, (self.num_heads, -1))
            for x in inputs[:3]
        )

        return run_form(form, q, k, v, inputs.gates).flatten(-2).to(inputs.q.dtype)


def list_sequences(
    batch_shape: Sequence[int], seq_lens: Tensor | None
) -> Callable[[], Sequences]:
    """Find the sequences of a padded batch, whose positions are rows.

    :param batch_shape: ``([E,]N,S)``.
    :param seq_lens: Their lengths; ``None`` if all are S. *Shape:* ``([E,]N)``.

    :returns: A function that does.
    """

    def find() -> Sequences:
        *batch, seq_len = batch_shape
        begins = [i * seq_len for i in range(math.prod(batch))]

        if seq_lens is None:
            return Sequences(begins, [seq_len] * len(begins))

        return Sequences(begins, seq_lens.flatten().tolist())

    return find


def follow_each_other(lens: list[int]) -> Callable[[], Sequences]:
    """Find sequences that follow each other without padding.

    :param lens: Their lengths, 0 allowed.

    :returns: A function that does.
    """
    return lambda: Sequences([0, *accumulate(lens)][:-1], lens)


def _chunk_size(q: Tensor) -> int:
    seq_len, head_dim = q.shape[-2:]
    chunk_size = best_chunk_size(seq_len, head_dim)

    # More multiply-adds, but half the passes over large memories, for which a CPU waits
    # longer.
    if q.is_cpu and chunk_size < seq_len and head_dim >= _LARGE_HEAD_DIM:
        return min(2 * chunk_size, seq_len)

    return chunk_size
