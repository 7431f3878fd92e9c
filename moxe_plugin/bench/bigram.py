"""What anyone could predict who saw the previous token only."""

from __future__ import annotations

from typing import Final, final

import numpy as np
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from moxe_plugin.data.tokens import TokensDataset
from moxe_plugin.models.clm import AuxLossCausalLM, Prediction

_COUNT_CHUNK: Final = 1 << 20
"""Pairs counted at a time, so that a long text needs little memory."""


def count_bigrams(dataset: TokensDataset, split: str) -> csr_array:
    """Count the pairs of neighbouring tokens of a split.

    :param dataset: The tokens.
    :param split: The name of the split.

    :returns: How often each token (column) follows each other one (row), without the
        zeros. *Shape:* ``(V,V)``.
    """
    vocab_size = dataset.shards.manifest.vocab_size
    stream = dataset.shards.stream(split)

    counts = csr_array((vocab_size, vocab_size), dtype=np.int64)

    for start in range(0, len(stream) - 1, _COUNT_CHUNK):
        # One more, so that the pair across two chunks is in the first of them.
        tokens = stream.read(start, min(start + _COUNT_CHUNK + 1, len(stream)))
        ones = np.ones(len(tokens) - 1, dtype=np.int64)

        # Equal pairs are summed when a row-wise matrix is made.
        counts += coo_array(
            (ones, (tokens[:-1], tokens[1:])), shape=counts.shape
        ).tocsr()

    return counts


@final
class BigramLM(AuxLossCausalLM):
    """A language model that looks at the previous token only.

    Interpolates, as Witten and Bell (1991, method C) do, the frequency of a token ``w``
    after the token ``v`` with a distribution that knows no context:

    ``p(w|v) = (c(v,w) + t(v) * p(w)) / (c(v) + t(v))``,

    where ``c(v,w)`` counts the pairs in the training text, ``c(v)`` sums them over
    ``w``, and ``t(v)`` is the number of different ``w`` among them. After a token that
    nothing ever followed, ``p(w|v) = p(w)``.

    Being a model, it is measured by the same code on the same text as the others; where
    a text has nothing before its first token, they all read the end-of-text token.

    :param counts: The counts ``c``. *Shape:* ``(V,V)``.
    :param unigram_logprobs: ``ln p`` in nats, all of them finite. *Shape:* ``(V)``.
    :param max_seq_len: The window of evaluation; changes no number.
    """

    _row_starts: Tensor
    _successors: Tensor

    def __init__(
        self, counts: csr_array, unigram_logprobs: NDArray[np.float64], max_seq_len: int
    ) -> None:
        super().__init__(max_seq_len, pad_idx=None, aux_loss_scales={}, stat_names=())

        row_starts = counts.indptr.astype(np.int64)
        successors = counts.indices.astype(np.int64)

        num_successors = np.diff(row_starts)
        totals = counts.sum(axis=1)

        is_seen = totals > 0
        backoffs = np.ones(len(totals))
        backoffs[is_seen] = num_successors[is_seen] / (totals + num_successors)[is_seen]

        rows = np.repeat(np.arange(len(totals)), num_successors)
        probs = counts.data / (totals + num_successors)[rows]
        probs += backoffs[rows] * np.exp(unigram_logprobs)[successors]

        def parameter(values: NDArray[np.float64]) -> Parameter:
            return Parameter(torch.tensor(values, dtype=torch.float32))

        self.unigram_logprobs = parameter(unigram_logprobs)
        # How much of a token's distribution is the unigram's.
        self.backoff_logprobs = parameter(np.log(backoffs))
        # Of the pairs that occur, row by row.
        self.pair_logprobs = parameter(np.log(probs))

        for name, values in (("_row_starts", row_starts), ("_successors", successors)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @override
    def predict(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        with_terms: bool,
        with_logits: bool = True,
        state_bag: IncrementalStateBag | None = None,
    ) -> Prediction:
        tokens = seqs.flatten()

        # (T,1) + (V) -> (T,V)
        logits = self.backoff_logprobs[tokens, None] + self.unigram_logprobs

        # The pairs of each token, one token after the other.
        starts = self._row_starts[tokens]
        num_pairs = self._row_starts[tokens + 1] - starts
        ends = num_pairs.cumsum(0)

        rows = torch.arange(len(tokens), device=seqs.device)
        rows = rows.repeat_interleave(num_pairs)
        pairs = torch.arange(len(rows), device=seqs.device)
        pairs = pairs + (starts - (ends - num_pairs))[rows]

        logits[rows, self._successors[pairs]] = self.pair_logprobs[pairs]

        return Prediction(logits.unflatten(0, seqs.shape), {}, {})

    @override
    def num_idle_parameters(self) -> float:
        return 0.0
