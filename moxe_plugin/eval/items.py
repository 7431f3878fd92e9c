"""What a model got on each document of a task, out of the harness' samples."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Sample = Mapping[str, Any]
"""What the harness logs of a document."""

TokenCounter = Callable[[tuple[Any, ...]], int]
"""Tells how many tokens of a request, given by its arguments, were predicted."""


def collect_items(
    output_type: str, samples: Sequence[Sample], count_tokens: TokenCounter
) -> dict[str, list[Any]]:
    """List a task's values by document.

    :param output_type: The harness' word for the kind of task.
    :param samples: The harness' samples.
    :param count_tokens: Counts the predicted tokens of a request.

    :returns: ``item``, a hash of each document in order, and the columns of the kind:
        ``logprob`` (nats), ``num_tokens`` and ``is_greedy`` of a continuation,
        ``logprob``, ``num_tokens``, ``num_words`` and ``num_bytes`` of a text,
        ``acc`` and, where the task has it, ``acc_norm`` of a choice, ``exact_match`` of
        an answer by the task's first filter; nothing for another kind of task.
    """
    if not samples:
        return {}

    # One sample per document and filter, the first filter first.
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    first.sort(key=lambda s: int(s["doc_id"]))

    rows = [_READERS[output_type](sample, count_tokens) for sample in first]
    if not rows[0]:
        return {}

    return {
        "item": hash_documents([sample["doc"] for sample in first]),
        **{name: [row[name] for row in rows] for name in rows[0]},
    }


def hash_documents(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name documents by their content.

    :param documents: The documents; equal ones are counted.

    :returns: 12 hexadecimal digits each, and ``-2`` and so on behind a document that
        occurred before.
    """
    seen: Counter[str] = Counter()
    names = []

    for document in documents:
        text = json.dumps(document, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]

        seen[digest] += 1
        names.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")

    return names


def _read_continuation(sample: Sample, count_tokens: TokenCounter) -> dict[str, float]:
    ((logprob, is_greedy),) = sample["resps"][0]

    return {
        "logprob": float(logprob),
        "num_tokens": count_tokens(sample["arguments"][0]),
        "is_greedy": int(is_greedy),
    }


def _read_text(sample: Sample, count_tokens: TokenCounter) -> dict[str, float]:
    (text,) = sample["arguments"][0]
    (logprob,) = sample["resps"][0]

    return {
        "logprob": float(logprob),
        "num_tokens": count_tokens((text,)),
        # As the harness counts them for `word_perplexity`.
        "num_words": len(re.split(r"\s+", text)),
        "num_bytes": len(text.encode()),
    }


def _read_metrics(*names: str) -> Callable[[Sample, TokenCounter], dict[str, float]]:
    def read(sample: Sample, _: TokenCounter) -> dict[str, float]:
        return {name: float(sample[name]) for name in names if name in sample}

    return read


_READERS: Final[Mapping[str, Callable[[Sample, TokenCounter], Mapping[str, float]]]] = {
    "loglikelihood": _read_continuation,
    "loglikelihood_rolling": _read_text,
    "multiple_choice": _read_metrics("acc", "acc_norm"),
    "generate_until": _read_metrics("exact_match"),
}
