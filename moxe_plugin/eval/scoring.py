"""Log-likelihoods of continuations, in batches padded on the right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import log_softmax

from moxe_plugin.eval.batching import Batching


class Score(NamedTuple):
    """How likely a model finds a continuation of a context."""

    logprob: float
    """The sum over the tokens of the continuation, in nats."""

    is_greedy: bool
    """Whether each token of the continuation is the most likely one."""


def score_continuations(
    model: CausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batching: Batching,
    on_scored: Callable[[int, Score], None],
) -> None:
    """Score continuations of contexts.

    The model reads ``context + continuation[:-1]``; when that is longer than
    ``max_length``, tokens are dropped from its left. Pairs with the same input, such as
    answers of one token to the same question, share one computation. Log-probabilities
    are taken in float32 and summed in float64.

    :param model: The model, in evaluation mode.
    :param pairs: Context and continuation as token ids; neither is empty.
    :param max_length: The most tokens that the model reads at a time.
    :param batching: Which inputs are computed together.
    :param on_scored: Called once per pair, with its index; in no particular order.

    :raises ValueError: A continuation is empty, or longer than ``max_length``.
    """
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"A continuation must have 1 to {max_length} tokens (`max_length`), "
                f"but has {len(continuation)} instead."
            )

    readers = defaultdict(list)  # input -> the pairs that need it
    for idx, (context, continuation) in enumerate(pairs):
        tokens = (*context, *continuation)[-(max_length + 1) :]
        readers[tokens[:-1]].append(idx)

    # Sorted, so that batches do not depend on the order of the requests.
    inputs = sorted(readers)

    for batch in batching.make_batches([len(i) for i in inputs]):
        batch_inputs = [inputs[i] for i in batch]
        logits = compute_logits(model, batch_inputs)

        for row, tokens in enumerate(batch_inputs):
            for idx in readers[tokens]:
                continuation = pairs[idx][1]
                begin = len(tokens) - len(continuation)
                score = _score(logits[row, begin : len(tokens)], continuation)
                on_scored(idx, score)


@torch.inference_mode()
def compute_logits(model: CausalLM, inputs: Sequence[Sequence[int]]) -> Tensor:
    """Run a model on sequences of any lengths, each from an empty state.

    :param model: The model, in evaluation mode.
    :param inputs: Token ids.

    :returns: The logits; meaningless beyond the length of a sequence. *Shape:*
        ``(N,S,V)``.
    """
    device = next(model.parameters()).device
    seq_lens = [len(i) for i in inputs]
    width = max(seq_lens)

    # No state passes through padding, so any valid id will do.
    seqs = torch.tensor([[*i, *([0] * (width - len(i)))] for i in inputs])
    seqs = seqs.to(device)

    logits = model(seqs, BatchLayout.of(seqs, seq_lens))
    assert isinstance(logits, Tensor)

    return logits


def _score(logits: Tensor, continuation: Sequence[int]) -> Score:
    targets = torch.tensor(continuation, device=logits.device)

    logprobs = log_softmax(logits, dim=-1, dtype=torch.float32)
    target_logprobs = logprobs.gather(1, targets[:, None])

    return Score(
        float(target_logprobs.sum(dtype=torch.float64)),
        bool((logits.argmax(dim=-1) == targets).all()),
    )
