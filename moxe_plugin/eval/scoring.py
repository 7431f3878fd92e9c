"""Log-likelihoods of continuations, in batches padded on the right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn.functional import log_softmax

from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.prefix_tree import (
    PrefixNode,
    build_prefix_forest,
    count_tokens,
    make_leaves,
)
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.recurrent_state import count_state_bytes, fork_states


class Score(NamedTuple):
    """How likely a model finds a continuation of a context."""

    logprob: float
    """The sum over the tokens of the continuation, in nats."""

    is_greedy: bool
    """Whether each token of the continuation is the most likely one."""


class TokenCounts(NamedTuple):
    """How much a model had to read, padding not counted."""

    computed: int
    """Tokens that it read."""

    unshared: int
    """Tokens that it would have read if every input had been computed whole."""


def resolve_sharing(model: CausalLM, share_prefixes: bool | None) -> bool:
    """Decide whether inputs that begin alike share the computation of their beginning.

    :param model: The model.
    :param share_prefixes: What is asked for; ``None`` asks for it if the model has a
        recurrent state, which can be copied, and parameters of at least float32. In
        less, the rounding of a state may choose other experts.

    :returns: The decision.

    :raises ValueError: It is asked for and the model has no recurrent state.
    """
    can_share = isinstance(model, AuxLossCausalLM) and model.has_recurrent_state

    if share_prefixes is None:
        dtype = next(model.parameters()).dtype

        return can_share and torch.finfo(dtype).bits >= 32

    if share_prefixes and not can_share:
        raise ValueError(
            "`share_prefixes` must be false for a model without recurrent state, such "
            f"as `{type(model).__name__}`."
        )

    return share_prefixes


def score_continuations(
    model: CausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batching: Batching,
    on_scored: Callable[[int, Score], None],
    share_prefixes: bool | None = None,
) -> TokenCounts:
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
    :param share_prefixes: As for :func:`resolve_sharing`.

    :returns: What was computed.

    :raises ValueError: A continuation is empty, or longer than ``max_length``; or
        prefixes cannot be shared.
    """
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"`continuation` must have 1 to {max_length} tokens (`max_length`), "
                f"but has {len(continuation)} instead."
            )

    share_prefixes = resolve_sharing(model, share_prefixes)

    readers = defaultdict(list)  # input -> the pairs that need it
    for idx, (context, continuation) in enumerate(pairs):
        tokens = (*context, *continuation)[-(max_length + 1) :]
        readers[tokens[:-1]].append(idx)

    # Sorted, so that batches do not depend on the order of the requests.
    inputs = sorted(readers)

    forest = build_prefix_forest(inputs) if share_prefixes else make_leaves(inputs)

    continuations = [
        [_Continuation(idx, len(tokens), pairs[idx][1]) for idx in readers[tokens]]
        for tokens in inputs
    ]

    _Scorer(model, continuations, max_length, batching, on_scored).score(forest)

    return TokenCounts(count_tokens(forest), sum(len(tokens) for tokens in inputs))


class _Continuation:
    # The score of a pair, which grows as the pieces of its input are computed.
    def __init__(self, idx: int, input_len: int, tokens: Sequence[int]) -> None:
        self.idx = idx
        self.begin = input_len - len(tokens)
        self.end = input_len
        self.tokens = tokens
        self.score = Score(0.0, is_greedy=True)

    def add(self, logits: Tensor, begin: int) -> bool:
        # Logits (S,V) at positions from `begin`; tells whether the score is complete.
        end = min(begin + logits.size(0), self.end)
        first = max(begin, self.begin)

        if first < end:
            part = _score(
                logits[first - begin : end - begin],
                self.tokens[first - self.begin : end - self.begin],
            )
            self.score = Score(
                self.score.logprob + part.logprob,
                self.score.is_greedy and part.is_greedy,
            )

        return end == self.end


class _Scorer:
    def __init__(
        self,
        model: CausalLM,
        continuations: Sequence[Sequence[_Continuation]],
        max_length: int,
        batching: Batching,
        on_scored: Callable[[int, Score], None],
    ) -> None:
        self._model = model
        self._continuations = continuations
        self._max_length = max_length
        self._batching = batching
        self._on_scored = on_scored
        self._device = next(model.parameters()).device

    @cached_property
    def _state_bytes(self) -> int:
        return measure_state_bytes(self._model)

    def score(
        self,
        nodes: Sequence[PrefixNode],
        state_bag: IncrementalStateBag | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        # `rows`: where in the bag the state before each node is.
        inner = [i for i, node in enumerate(nodes) if node.children]
        leaves = [i for i, node in enumerate(nodes) if not node.children]

        # Depth first: few states are alive at a time.
        for group in (inner, leaves):
            lengths = [len(nodes[i].tokens) for i in group]

            keeps_state = state_bag is not None or group is inner
            state_bytes = self._state_bytes if keeps_state and group else 0

            for batch in self._batching.make_batches(lengths, state_bytes):
                indices = [group[i] for i in batch]

                fork = None
                if state_bag is not None:
                    fork = self._fork(state_bag, [rows[i] for i in indices])
                elif group is inner:
                    fork = IncrementalStateBag(self._max_length + 1)

                self._score_batch([nodes[i] for i in indices], fork)

    def _score_batch(
        self, nodes: Sequence[PrefixNode], state_bag: IncrementalStateBag | None
    ) -> None:
        logits = compute_logits(self._model, [n.tokens for n in nodes], state_bag)

        for row, node in enumerate(nodes):
            node_logits = logits[row, : len(node.tokens)]

            for member in node.members:
                for continuation in self._continuations[member]:
                    if continuation.add(node_logits, node.begin):
                        self._on_scored(continuation.idx, continuation.score)

        del logits

        if state_bag is not None:
            children = [
                (child, row)
                for row, node in enumerate(nodes)
                for child in node.children
            ]
            self.score(
                [child for child, _ in children],
                state_bag,
                [row for _, row in children],
            )

    def _fork(
        self, state_bag: IncrementalStateBag, rows: Sequence[int]
    ) -> IncrementalStateBag:
        return fork_states(
            self._model, state_bag, torch.tensor(rows, device=self._device)
        )


@torch.inference_mode()
def compute_logits(
    model: CausalLM,
    inputs: Sequence[Sequence[int]],
    state_bag: IncrementalStateBag | None = None,
) -> Tensor:
    """Run a model on sequences of any lengths.

    :param model: The model, in evaluation mode.
    :param inputs: Token ids.
    :param state_bag: The state before each sequence, empty at first, and then that
        after it; only for a model with recurrent state. Every sequence is read from an
        empty state if ``None``.

    :returns: The logits; meaningless beyond the length of a sequence. *Shape:*
        ``(N,S,V)``.
    """
    device = next(model.parameters()).device
    seq_lens = [len(i) for i in inputs]
    width = max(seq_lens)

    # No state passes through padding, so any valid id will do.
    seqs = torch.tensor([[*i, *([0] * (width - len(i)))] for i in inputs])
    seqs = seqs.to(device)

    logits = model(seqs, BatchLayout.of(seqs, seq_lens), state_bag=state_bag)
    assert isinstance(logits, Tensor)

    return logits


def measure_state_bytes(model: CausalLM) -> int:
    """Tell how large the recurrent state of one sequence is, whatever its length.

    :param model: The model, in evaluation mode.

    :returns: Bytes; 0 for a model without recurrent state.
    """
    state_bag = IncrementalStateBag(2)
    compute_logits(model, [[0]], state_bag)

    return count_state_bytes(model, state_bag)


def _score(logits: Tensor, continuation: Sequence[int]) -> Score:
    targets = torch.tensor(continuation, device=logits.device)

    logprobs = log_softmax(logits, dim=-1, dtype=torch.float32)
    target_logprobs = logprobs.gather(1, targets[:, None])

    return Score(
        float(target_logprobs.sum(dtype=torch.float64)),
        bool((logits.argmax(dim=-1) == targets).all()),
    )
