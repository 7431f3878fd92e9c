"""Measurements without models."""

from __future__ import annotations

from typing import Any

import numpy as np

from moxe_plugin.claims.measurements import RunMeasurement
from moxe_plugin.claims.routing_measures import (
    NUM_RARITY_BINS,
    LayerRouting,
    TokenFacts,
    measure_layer,
)

NUM_DOCUMENTS = 6
NUM_PASSAGES = 20


def make_run(
    system: str = "moxe",
    seed: int = 1,
    *,
    loss: float = 4.0,
    word_loss: float = 16.0,
    mlstm_share: float = 0.5,
    num_layers: int = 2,
    setting: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> RunMeasurement:
    """Make the measurement of a run with given losses.

    :param system: The system.
    :param seed: The seed; it moves the losses by thousandths.
    :param loss: Held-out nats per token.
    :param word_loss: Nats per last word.
    :param mlstm_share: The mean share of places with mLSTM experts.
    :param num_layers: Layers with a router.
    :param setting: Instead of the usual setting.
    :param model: Instead of the usual model.

    :returns: The measurement.
    """
    # Texts differ by documents, not by systems.
    tokens = np.arange(100, 100 + NUM_DOCUMENTS)
    wobble = np.sin(np.arange(NUM_DOCUMENTS)) * 0.1
    word_wobble = np.cos(np.arange(NUM_PASSAGES))

    generator = np.random.default_rng(seed)

    return RunMeasurement(
        key="0" * 64,
        system=system,
        seed=seed,
        step=200,
        model=model
        or {
            "family": system.split("_")[0],
            "config": {},
            "num_parameters": 1_900_000,
            "num_active_parameters": 800_000,
            "forward_flops_per_token": 1_640_000,
            "num_mlstm_experts": 4,
        },
        setting=setting
        or {
            "train_sha256": "1" * 64,
            "training_tokens": 409_600,
            "tokenizer_sha256": "2" * 64,
            "vocab_size": 2048,
            "window_len": 128,
            "text": "valid.jsonl",
            "text_sha256": "3" * 64,
            "max_doc_tokens": 1536,
            "lambada_sha256": "4" * 64,
            "num_passages": NUM_PASSAGES,
        },
        training={
            "tokens": [204_800, 409_600],
            "NLL Loss": [5.0, loss],
            **{f"layer_{i}/mlstm_share": [0.5, mlstm_share] for i in range(num_layers)},
        },
        documents={
            "num_tokens": tokens.tolist(),
            "nll": (tokens * (loss + seed / 1000 + wobble)).tolist(),
            "unigram_nll": (tokens * 6.5).tolist(),
        },
        passages={
            "num_tokens": [3] * NUM_PASSAGES,
            "nll": (word_loss + seed / 1000 + word_wobble).tolist(),
            "is_greedy": [0] * (NUM_PASSAGES - 1) + [1],
            "unigram_nll": [19.5] * NUM_PASSAGES,
        },
        layers=[_make_layer(generator, mlstm_share) for _ in range(num_layers)],
    )


def _make_layer(
    generator: np.random.Generator, mlstm_share: float
) -> dict[str, list[Any]]:
    layer: dict[str, list[Any]] = {}

    for _ in range(NUM_DOCUMENTS):
        num_tokens = 100
        rarity = generator.uniform(2, 9, num_tokens)
        difficulty = np.clip((rarity + generator.normal(size=num_tokens)) / 12, 0, 1)
        raw = generator.normal(size=num_tokens) * 0.1

        facts = TokenFacts(
            rarity,
            ((rarity - 2) / 7 * NUM_RARITY_BINS).astype(np.int64),
            own_nll=rarity,
            next_nll=generator.uniform(2, 9, num_tokens),
        )
        routing = LayerRouting(
            difficulty,
            np.clip(mlstm_share + (rarity - 5.5) / 35, 0, 1),
            raw + 0.6 * difficulty,
            raw,
        )

        for name, value in measure_layer(facts, routing, 0.3).items():
            layer.setdefault(name, []).append(value)

    return layer
