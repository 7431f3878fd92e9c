"""Measures a trained run on held-out text: losses, and where tokens are sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq2.models.clm import CausalLM
from numpy.typing import NDArray

from moxe_plugin.bench.guesses import count_tokens, unigram_logprobs
from moxe_plugin.bench.metrics import read_train_metrics, sum_up
from moxe_plugin.bench.resolution import open_tokens_section
from moxe_plugin.claims.held_out import (
    Documents,
    Passages,
    rarity_bins,
    read_documents,
    read_passages,
)
from moxe_plugin.claims.measurements import SCHEMA_VERSION, RunMeasurement
from moxe_plugin.claims.routing_measures import (
    NUM_RARITY_BINS,
    TokenFacts,
    measure_layer,
)
from moxe_plugin.claims.run_description import describe_model, read_training
from moxe_plugin.claims.run_search import identify
from moxe_plugin.claims.tracing import bias_scale, trace_windows
from moxe_plugin.console import Stages
from moxe_plugin.data.manifest import compute_sha256
from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.eval.scoring import Score, score_continuations
from moxe_plugin.eval.text_codec import TextCodec
from moxe_plugin.models.train_output import TrainOutput
from moxe_plugin.report.statistics import Array


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Which held-out text is read, and how much of it."""

    text: Path
    """Held-out documents."""

    lambada: Path | None
    """Passages whose last word is to be predicted."""

    max_doc_tokens: int
    """The most tokens of a document."""

    max_passages: int
    """The most passages."""


class _Text(NamedTuple):
    documents: Documents
    passages: Passages | None
    unigram_nll: Array
    """Of each token, in nats. *Shape:* ``(V)``."""

    rarity_bin: NDArray[np.int64]
    """Of each token. *Shape:* ``(V)``."""


def compute_key(output: TrainOutput, options: MeasureOptions) -> str:
    """Hash everything that the measurement of a run depends on.

    :param output: The run.
    :param options: What it is measured on.

    :returns: A digest, in hexadecimal.
    """
    texts = [file for file in (options.text, options.lambada) if file is not None]
    files = sorted(file for file in output.model_dir.rglob("*") if file.is_file())

    content = {
        "schema_version": SCHEMA_VERSION,
        "files": [compute_sha256(file) for file in (*files, *texts)],
        "card": dict(output.model_card),
        "recipe": dict(output.recipe_config),
        "options": [options.max_doc_tokens, options.max_passages],
        "has_lambada": options.lambada is not None,
    }

    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def measure_run(
    output: TrainOutput,
    options: MeasureOptions,
    device: torch.device,
    stages: Stages,
) -> RunMeasurement:
    """Measure one run.

    Documents and passages are read in windows of the training length: the model sees
    the end-of-text token and then the document, and starts each window anew, knowing
    only the token before it, as in training.

    :param output: The run, finished.
    :param options: What to measure it on.
    :param device: Where to compute.
    :param stages: Shows progress.

    :returns: The measurement.
    """
    loaded = load_checkpoint(output.dir, step=output.step, device=device)
    codec = TextCodec(loaded.tokenizer, None, add_bos_token=False)

    section = output.recipe_config["dataset"]
    window_len = int(section["seq_len"])

    text = _read_text(section, codec, options)
    documents, layers = _measure_documents(
        loaded.model, text, codec.prefix_token_id, window_len, stages
    )

    passages = None
    if text.passages is not None:
        passages = _measure_passages(loaded.model, text, codec, window_len, stages)

    system, seed = identify(output)

    return RunMeasurement(
        key=compute_key(output, options),
        system=system,
        seed=seed,
        step=output.step,
        model=describe_model(output, loaded.model),
        setting=_describe_setting(output, text, options),
        training=read_training(output.dir),
        documents=documents,
        passages=passages,
        layers=layers,
    )


def _read_text(
    section: Mapping[str, Any], codec: TextCodec, options: MeasureOptions
) -> _Text:
    counts = count_tokens(open_tokens_section(section), section["train_split"])

    passages = None
    if options.lambada is not None:
        passages = read_passages(options.lambada, codec.encode, options.max_passages)

    return _Text(
        read_documents(options.text, codec.encode, options.max_doc_tokens),
        passages,
        -unigram_logprobs(counts),
        rarity_bins(counts, NUM_RARITY_BINS),
    )


def _measure_documents(
    model: CausalLM, text: _Text, prefix_id: int, window_len: int, stages: Stages
) -> tuple[dict[str, list[float]], list[dict[str, list[Any]]]]:
    documents: dict[str, list[float]] = {"num_tokens": [], "nll": [], "unigram_nll": []}
    layers: list[dict[str, list[Any]]] = []

    total = len(text.documents.token_ids)

    with stages.start("Reading documents", total) as stage:
        for ids in stage.over(text.documents.token_ids):
            nll, routings = trace_windows(model, ids, prefix_id, window_len)
            rarity = text.unigram_nll[ids]

            documents["num_tokens"].append(len(ids))
            documents["nll"].append(float(nll.sum()))
            documents["unigram_nll"].append(float(rarity.sum()))

            # The last token is never read, the first reading is of the prefix.
            facts = TokenFacts(
                rarity[:-1],
                text.rarity_bin[ids[:-1]],
                own_nll=nll[:-1],
                next_nll=nll[1:],
            )

            if not layers:
                layers = [{} for _ in routings]

            for layer, routing in zip(layers, routings, strict=True):
                measures = measure_layer(facts, routing, bias_scale(model))
                for name, value in measures.items():
                    layer.setdefault(name, []).append(value)

    return documents, layers


def _measure_passages(
    model: CausalLM, text: _Text, codec: TextCodec, window_len: int, stages: Stages
) -> dict[str, list[float]]:
    assert text.passages is not None
    pairs = text.passages.pairs

    scores: dict[int, Score] = {}

    with stages.start("Predicting last words", len(pairs)) as stage:

        def keep(idx: int, score: Score) -> None:
            scores[idx] = score
            stage.advance()

        score_continuations(
            model,
            pairs,
            max_length=window_len,
            batching=Batching(batch_size="auto", vocab_size=codec.vocab_size),
            on_scored=keep,
        )

    return {
        "num_tokens": [len(word) for _, word in pairs],
        "nll": [-scores[idx].logprob for idx in range(len(pairs))],
        "is_greedy": [int(scores[idx].is_greedy) for idx in range(len(pairs))],
        "unigram_nll": [float(text.unigram_nll[list(word)].sum()) for _, word in pairs],
    }


def _describe_setting(
    output: TrainOutput, text: _Text, options: MeasureOptions
) -> dict[str, Any]:
    section = output.recipe_config["dataset"]
    shards = open_tokens_section(section).shards

    passages = text.passages

    return {
        "train_sha256": shards.stream(section["train_split"]).compute_sha256(),
        "training_tokens": sum_up(read_train_metrics(output.dir, "")).num_tokens,
        "tokenizer_sha256": shards.manifest.tokenizer_sha256,
        "vocab_size": shards.manifest.vocab_size,
        "window_len": section["seq_len"],
        "text": options.text.name,
        "text_sha256": text.documents.sha256,
        "max_doc_tokens": options.max_doc_tokens,
        "lambada_sha256": None if passages is None else passages.sha256,
        "num_passages": 0 if passages is None else len(passages.pairs),
    }
