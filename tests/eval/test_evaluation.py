"""Tests of moxe_plugin/eval/evaluation.py: our tasks with the harness around them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.evaluation import evaluate
from tests.eval.requests import make_requests

TEXTS = ["The cat sat on the mat.", "One two three four.", "Ünïcödé counts in bytes."]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Write a file for the tasks that read one."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    return str(path)


def test_metrics_follow_from_the_loglikelihoods(loaded: LoadedModel, file: str) -> None:
    lm = LoadedModelLM(loaded)
    rolling = lm.loglikelihood_rolling(
        make_requests("loglikelihood_rolling", *[(text,) for text in TEXTS])
    )
    pairs = [(" ".join(t.split(" ")[:-1]), " " + t.split(" ")[-1]) for t in TEXTS]
    last_words = lm.loglikelihood(make_requests("loglikelihood", *pairs))

    results = evaluate(
        loaded, ["moxe_fineweb_edu_256", "moxe_lambada"], metadata={"file": file}
    )

    nats = -sum(rolling)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_words = sum(len(text.split()) for text in TEXTS)
    metrics = results["results"]["moxe_fineweb_edu_256"]
    assert metrics["bits_per_byte,none"] == pytest.approx(
        nats / num_bytes / math.log(2), rel=1e-6
    )
    assert metrics["word_perplexity,none"] == pytest.approx(
        math.exp(nats / num_words), rel=1e-5
    )

    mean = sum(logprob for logprob, _ in last_words) / len(TEXTS)
    metrics = results["results"]["moxe_lambada"]
    assert metrics["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-5)
    assert metrics["acc,none"] == sum(greedy for _, greedy in last_words) / len(TEXTS)

    assert results["config"]["model_name"] == "xlstm"
    assert results["n-samples"]["moxe_lambada"]["effective"] == len(TEXTS)
    assert "samples" not in results
