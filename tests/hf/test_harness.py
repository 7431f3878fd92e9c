"""lm-evaluation-harness' own model ``hf`` gives the scores of our model ``moxe``."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture
def hf_kls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the class of the harness' model ``hf``.

    It imports accelerate, which only several devices need.
    """
    if find_spec("accelerate") is None:
        names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")
        stub, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
        for name in names:
            setattr(stub, name, None)
        utils.get_max_memory = None  # type: ignore[attr-defined]  # a stub

        monkeypatch.setitem(sys.modules, "accelerate", stub)
        monkeypatch.setitem(sys.modules, "accelerate.utils", utils)

    return import_module("lm_eval.models.huggingface").HFLM


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_hf_gives_the_scores_of_the_model_moxe(
    export: Export, hf_kls: Any, family: str
) -> None:
    register_transformers_classes()

    folder = export(family).folder
    load: Any = AutoModelForCausalLM.from_pretrained
    load_tokenizer: Any = AutoTokenizer.from_pretrained

    theirs = hf_kls(load(folder), tokenizer=load_tokenizer(folder), batch_size=3)
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
