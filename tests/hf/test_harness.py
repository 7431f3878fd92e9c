"""lm-evaluation-harness' own model ``hf`` gives the scores of our model ``moxe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from moxe_plugin.eval import agreement
from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.eval.registration import register_transformers_classes
from tests.eval.requests import make_requests
from tests.hf.conftest import Export
from tests.models.families import FAMILIES

TEXT = "some text to learn from, and more of it: äöü 12345 " * 6
"""Of more tokens than a window has."""

CONTINUATIONS = [
    ("some text to", " learn"),
    ("", "some text"),
    ("some text", " to learn from 123"),
    (TEXT, " and more"),
    ("some ", " text"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_hf_gives_the_scores_of_the_model_moxe(
    export: Export, family: str
) -> None:
    register_transformers_classes()

    folder = export(family).folder
    load: Any = AutoModelForCausalLM.from_pretrained
    load_tokenizer: Any = AutoTokenizer.from_pretrained

    theirs = HFLM(load(folder), tokenizer=load_tokenizer(folder), batch_size=3)
    ours = LoadedModelLM(load_checkpoint(folder), batch_size=2)

    assert theirs.max_length == ours.max_length == 64
    assert theirs.prefix_token_id == ours.prefix_token_id
    assert theirs.eot_token_id == ours.eot_token_id
    assert len(theirs.tok_encode(TEXT)) > 2 * 64

    requests = make_requests("loglikelihood", *CONTINUATIONS)
    pairs = zip(
        theirs.loglikelihood(requests, disable_tqdm=True),
        ours.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    )
    for (logprob, is_greedy), (our_logprob, our_is_greedy) in pairs:
        assert logprob == pytest.approx(our_logprob, abs=1e-4)
        assert is_greedy == our_is_greedy

    requests = make_requests("loglikelihood_rolling", (TEXT,), ("some text",))
    assert theirs.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(
        ours.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5, abs=1e-4
    )

    # Of different lengths, so that the harness pads on the left.
    options = {"until": ["zz"], "max_gen_toks": 8}
    requests = make_requests(
        "generate_until", *((text, options) for text, _ in CONTINUATIONS if text)
    )
    assert theirs.generate_until(requests, disable_tqdm=True) == ours.generate_until(
        requests, disable_tqdm=True
    )


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    """Write passages of different lengths, one longer than the window."""
    texts = ["A short one", TEXT.strip(), *(TEXT[: 20 + 7 * n] for n in range(9))]
    file = tmp_path / "lambada.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    return file


@pytest.mark.parametrize("family", ["gemma2", "qwen_moe"])
def test_the_command_finds_that_hf_and_single_requests_agree(
    export: Export, lambada: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(export(family).folder)

    assert agreement.main([folder, "--lambada", str(lambada)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" requests")[0] for line in lines] == [
        "agrees: hf and moxe: 11",
        "agrees: moxe with batch size 1 and auto: 11",
    ]


def test_the_command_tells_that_weights_differ(
    export: Export,
    lambada: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def load_other(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.01)

        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_other)

    folder = str(export("gemma2").folder)

    assert agreement.main([folder, "--lambada", str(lambada), "--limit", "3"]) == 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DIFFERS: hf and moxe: 3 requests")
    assert lines[1].startswith("agrees: moxe with batch size 1 and auto: 3")


def test_passages_that_are_missing_are_named(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(export("gemma2").folder)

    assert agreement.main([folder, "--lambada", str(tmp_path / "no.jsonl")]) == 2

    assert "no.jsonl" in capsys.readouterr().err
