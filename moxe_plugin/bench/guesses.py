"""What anyone could predict who saw next to nothing of the context: sanity rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from fairseq2.device import CPU
from fairseq2.gang import create_fake_gangs
from fairseq2.nn import BatchLayout, IncrementalStateBag
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from moxe_plugin.bench.bigram import BigramLM, count_bigrams
from moxe_plugin.bench.plan import StagePlan
from moxe_plugin.bench.resolution import open_tokens_section
from moxe_plugin.bench.scoring import evaluate_tasks, measure_loss
from moxe_plugin.data.tokens import TokensDataset
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.tokenizers import load_recorded_tokenizer
from moxe_plugin.models.clm import AuxLossCausalLM, Prediction

_COUNT_CHUNK = 1 << 20
"""Tokens counted at a time, so that a long text needs little memory."""


def uniform_logprobs(vocab_size: int) -> NDArray[np.float64]:
    """Give every token the same probability.

    :param vocab_size: The size of the vocabulary.

    :returns: ``-ln(V)`` for each token, in nats. *Shape:* ``(V)``.
    """
    return np.full(vocab_size, -np.log(vocab_size))


def unigram_logprobs(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give every token its frequency, smoothed by one.

    :param counts: How often each token occurs in the training text. *Shape:* ``(V)``.

    :returns: ``ln((count + 1) / (sum(count) + V))`` in nats. *Shape:* ``(V)``.
    """
    logprobs: NDArray[np.float64] = np.log((counts + 1) / (counts.sum() + len(counts)))

    return logprobs


def count_tokens(dataset: TokensDataset, split: str) -> NDArray[np.int64]:
    """Count the tokens of a split.

    :param dataset: The tokens.
    :param split: The name of the split.

    :returns: How often each token occurs. *Shape:* ``(V)``.
    """
    vocab_size = dataset.shards.manifest.vocab_size
    stream = dataset.shards.stream(split)

    counts = np.zeros(vocab_size, dtype=np.int64)

    for start in range(0, len(stream), _COUNT_CHUNK):
        tokens = stream.read(start, min(start + _COUNT_CHUNK, len(stream)))
        counts += np.bincount(tokens, minlength=vocab_size)

    return counts


@final
class GuessLM(AuxLossCausalLM):
    """A language model that ignores its input.

    Being a model, it is measured by the same code on the same text as the others.

    :param logprobs: The log-probability of each token. *Shape:* ``(V)``.
    :param max_seq_len: The window of evaluation; changes no number.
    """

    def __init__(self, logprobs: Tensor, max_seq_len: int) -> None:
        super().__init__(max_seq_len, pad_idx=None, aux_loss_scales={}, stat_names=())

        self.logprobs = Parameter(logprobs)

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
        # (V) -> (N,S,V)
        logits = self.logprobs.expand(*seqs.shape, -1)

        return Prediction(logits, {}, {})

    @override
    def num_idle_parameters(self) -> float:
        return 0.0


def create_guess(
    guess: str, dataset: TokensDataset, train_split: str, max_seq_len: int
) -> AuxLossCausalLM:
    """Create a guess, counting what it is made of.

    :param guess: ``uniform``, ``unigram`` or ``bigram``.
    :param dataset: The tokens.
    :param train_split: The name of the split that is counted.
    :param max_seq_len: The window of evaluation; changes no number.

    :returns: The guess, as a language model.

    :raises ValueError: ``guess`` is unknown.
    """
    if guess == "uniform":
        logprobs = uniform_logprobs(dataset.vocab_size)
    elif guess in ("unigram", "bigram"):
        logprobs = unigram_logprobs(count_tokens(dataset, train_split))
    else:
        raise ValueError(
            f"`guess` must be uniform, unigram or bigram, but is '{guess}' instead."
        )

    if guess == "bigram":
        return BigramLM(count_bigrams(dataset, train_split), logprobs, max_seq_len)

    return GuessLM(torch.tensor(logprobs, dtype=torch.float32), max_seq_len)


def evaluate_guess(stage: StagePlan) -> dict[str, Any]:
    """Evaluate a guess on the text that a suite's systems are evaluated on.

    :param stage: The guess; its configuration says which.

    :returns: ``evals``: files of the record by name; ``items``: values by document of
        each task.
    """
    config = stage.config
    guess, section = config["guess"], config["dataset"]

    dataset = open_tokens_section(section)
    tokenizer = load_recorded_tokenizer(config["tokenizer"], stage.run_dir)

    model = create_guess(guess, dataset, section["train_split"], section["seq_len"])
    model.eval()

    reader = dataset.create_reader(
        section["valid_split"],
        create_fake_gangs(CPU),
        batch_size=section["batch_size"],
        seq_len=section["seq_len"],
        shuffle=False,
        max_num_batches=section["max_num_valid_batches"],
    )
    loss = measure_loss(model, (batch for step in reader for batch in step))

    loaded = LoadedModel(model, tokenizer, guess, None, {})
    results, items = evaluate_tasks(loaded, config, "pretrained")

    if guess == "uniform":
        _drop_greediness(results, items)

    evals = {"guess": {**results, "valid_loss_nats": loss["nll_nats"]}}

    return {"evals": evals, "items": items}


def _drop_greediness(
    results: dict[str, Any], items: Mapping[str, dict[str, list[Any]]]
) -> None:
    # All tokens are equally likely, so no continuation is the greedy one. The choice
    # among answers stays: the shortest one is the most likely.
    for task, columns in items.items():
        if columns.pop("is_greedy", None) is not None:
            metrics = results["results"][task]

            for name in [n for n in metrics if n.startswith("acc")]:
                del metrics[name]
