"""Tests of moxe_plugin/eval/evaluation.py: our tasks with the harness around them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.evaluation import TaskRequest, evaluate
from moxe_plugin.eval.items import collect_items, hash_documents
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

    names = ["moxe_fineweb_edu_256", "moxe_lambada"]
    results, items = evaluate(
        loaded, [TaskRequest(task=name, arguments={"file": file}) for name in names]
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

    # All measures follow from the items too.
    texts, words = items["moxe_fineweb_edu_256"], items["moxe_lambada"]
    assert texts["logprob"] == pytest.approx(rolling)
    assert texts["num_bytes"] == [len(text.encode()) for text in TEXTS]
    assert texts["num_words"] == [len(text.split()) for text in TEXTS]
    # The tokenizer is one of bytes.
    assert texts["num_tokens"] == texts["num_bytes"]

    assert words["logprob"] == pytest.approx([logprob for logprob, _ in last_words])
    assert words["is_greedy"] == [int(is_greedy) for _, is_greedy in last_words]
    assert words["num_tokens"] == [len(word.encode()) for _, word in pairs]
    assert words["item"] == texts["item"], "the same documents"
    assert len(set(words["item"])) == len(TEXTS)


def test_choices_have_items(loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "choices.jsonl"
    question = {"query": "Question: why?\n", "choices": ["so", "or so"], "gold": 1}
    file.write_text(f"{json.dumps(question)}\n" * 3)

    request = TaskRequest(
        task="moxe_multiple_choice", limit=2, arguments={"file": str(file)}
    )
    results, items = evaluate(loaded, [request])

    chosen = items["moxe_multiple_choice"]
    assert list(chosen) == ["item", "acc", "acc_norm"]
    metrics = results["results"]["moxe_multiple_choice"]
    assert [metrics["acc,none"]] * 2 == chosen["acc"]
    # A document that occurs twice is two items.
    assert chosen["item"][1] == f"{chosen['item'][0]}-2"
    assert results["config"]["limits"] == {"moxe_multiple_choice": 2}


def test_answers_are_judged_by_the_first_filter_in_the_order_of_documents() -> None:
    samples = [
        {"doc_id": doc_id, "doc": {"n": doc_id}, "filter": name, "exact_match": value}
        for name, value in (("strict", 0.0), ("flexible", 1.0))
        for doc_id in (2, 0, 1)
    ]

    items = collect_items("generate_until", samples, lambda _: 0)

    assert items["exact_match"] == [0.0, 0.0, 0.0]
    assert items["item"] == hash_documents([{"n": 0}, {"n": 1}, {"n": 2}])


def test_task_that_is_not_known_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(
        ValueError, match=r"but has no_task\. Tasks of this package: moxe"
    ):
        evaluate(loaded, [TaskRequest(task="no_task")])
