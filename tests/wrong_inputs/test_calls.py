"""Checks how functions answer wrong arguments, beside those of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import load_checkpoint
from tests.eval.requests import make_requests


@pytest.fixture(scope="module")
def lm(places: Mapping[str, Path]) -> LoadedModelLM:
    """Load the trained model for the harness.

    :param places: Where it is.

    :returns: The adapter; its model reads 64 tokens.
    """
    return LoadedModelLM(load_checkpoint(places["run"]))


_CALLS: Mapping[str, tuple[Callable[[LoadedModelLM], object], str]] = {
    "continuation_longer_than_context": (
        lambda lm: lm.loglikelihood(make_requests("loglikelihood", ("a", "b " * 80))),
        r"`continuation` must have 1 to 64 tokens \(`max_length`\), but has 1",
    ),
    "generation_longer_than_context": (
        lambda lm: lm.generate_until(
            make_requests("generate_until", ("a", {"max_gen_toks": 64}))
        ),
        r"`max_gen_toks` must be less than `max_length` \(64\), but is 64",
    ),
    "generation_of_0_tokens": (
        lambda lm: lm.generate_until(
            make_requests("generate_until", ("a", {"max_gen_toks": 0}))
        ),
        "`max_gen_toks` must be positive",
    ),
    "unknown_generation_argument": (
        lambda lm: lm.generate_until(
            make_requests("generate_until", ("a", {"temprature": 1.0}))
        ),
        "`temprature`",
    ),
    "stop_string_is_no_text": (
        lambda lm: lm.generate_until(
            make_requests("generate_until", ("a", {"until": [5]}))
        ),
        "`until` must",
    ),
    "negative_temperature": (
        lambda lm: lm.generate_until(
            make_requests(
                "generate_until", ("a", {"do_sample": True, "temperature": -1.0})
            )
        ),
        "`temperature` must",
    ),
}


@pytest.mark.parametrize(("call", "message"), _CALLS.values(), ids=_CALLS)
def test_wrong_request_is_refused(
    lm: LoadedModelLM, call: Callable[[LoadedModelLM], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_empty_texts_are_answered(lm: LoadedModelLM) -> None:
    # No mistake: a text without tokens is certain, and an empty context has a stand-in.
    (rolling,) = lm.loglikelihood_rolling(make_requests("loglikelihood_rolling", ("",)))
    assert rolling == 0.0

    ((logprob, _),) = lm.loglikelihood(make_requests("loglikelihood", ("", "a")))
    assert torch.tensor(logprob).isfinite()
    assert logprob < 0.0
