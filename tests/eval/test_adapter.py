"""Tests of moxe_plugin/eval/adapter.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout
from lm_eval.api.model import CachingLM

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from tests.common import BOS_IDX, EOS_IDX
from tests.eval.conftest import Load
from tests.eval.requests import make_requests

FAMILIES = ["moxe", "xlstm", "gemma2", "qwen_moe"]

PAIRS = [
    ("The cell keeps", " a memory"),
    ("", "empty context"),
    ("trailing space ", "moves"),
    ("   ", "spaces only"),
    ("q", " a longer continuation than the context"),
    ("same question", " a"),
    ("same question", " b"),
    ("a much longer context " * 8, "cut"),
]


def direct_score(
    loaded: LoadedModel, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Score a continuation alone, by the definition."""
    device = next(loaded.model.parameters()).device
    seqs = torch.tensor([[*context, *continuation][:-1]], device=device)

    with torch.no_grad():
        logits = loaded.model(seqs, BatchLayout.of(seqs))
    assert isinstance(logits, torch.Tensor)

    logprobs = torch.log_softmax(logits[0].float(), dim=-1)

    total, is_greedy = 0.0, True
    for offset, token in enumerate(continuation):
        position = len(context) + offset - 1
        total += float(logprobs[position, token])
        is_greedy &= int(logprobs[position].argmax()) == token

    return total, is_greedy


def score(
    loaded: LoadedModel, pairs: Sequence[tuple[str, str]], **options: Any
) -> list[tuple[float, bool]]:
    """Score continuations through the harness' interface."""
    lm = LoadedModelLM(loaded, **options)

    requests = make_requests("loglikelihood", *pairs)
    scores: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)

    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_is_the_log_softmax_of_the_model(load: Load, family: str) -> None:
    loaded = load(family)
    max_length = loaded.model.max_seq_len

    scores = score(loaded, PAIRS, batch_size=4)

    for (context, continuation), (logprob, is_greedy) in zip(
        PAIRS, scores, strict=True
    ):
        stripped = context.rstrip()
        tokens = (context[len(stripped) :] + continuation).encode()
        prefix = stripped.encode() or bytes(0)
        ids = [*prefix] or [BOS_IDX]
        ids = ids[max(0, len(ids) + len(tokens) - max_length - 1) :]

        expected, expected_greedy = direct_score(loaded, ids, list(tokens))

        assert logprob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_change_no_score(load: Load, family: str) -> None:
    loaded = load(family)

    one = score(loaded, PAIRS, batch_size=1)
    eight = score(loaded, PAIRS, batch_size=8)
    auto = score(loaded, PAIRS, batch_size="auto")

    order = torch.randperm(len(PAIRS)).tolist()
    shuffled = score(loaded, [PAIRS[i] for i in order], batch_size=3)

    for idx, (logprob, is_greedy) in enumerate(one):
        for other in (eight[idx], auto[idx], shuffled[order.index(idx)]):
            assert other[0] == pytest.approx(logprob, abs=1e-5 * max(1, -logprob))
            assert other[1] == is_greedy


def test_a_greedy_continuation_is_recognised(loaded: LoadedModel) -> None:
    prompt = "abc"
    lm = LoadedModelLM(loaded)
    seqs = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        logits = loaded.model(seqs.to(lm.device), BatchLayout.of(seqs.to(lm.device)))
    assert isinstance(logits, torch.Tensor)
    best = int(logits[0, -1].argmax())

    request = ((prompt, "?"), list(prompt.encode()), [best])
    other = ((prompt, "?"), list(prompt.encode()), [(best + 1) % 256])
    results = lm._loglikelihood_tokens([request, other], disable_tqdm=True)

    assert [is_greedy for _, is_greedy in results] == [True, False]


def test_context_is_cut_on_the_left(loaded: LoadedModel) -> None:
    long = "unseen " * 30 + "the end"

    (cut,) = score(loaded, [(long, " now")], max_length=10)
    # 10 tokens are read: 7 of the context and all of the continuation but its last.
    (direct,) = score(loaded, [(long[-7:], " now")])

    assert cut == pytest.approx(direct, abs=1e-5)


def test_a_continuation_that_cannot_be_scored_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"1 to 4 tokens \(`max_length`\), but has 5"):
        score(loaded, [("context", "12345")], max_length=4)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 31])
def test_rolling_predicts_each_token_once(loaded: LoadedModel, length: int) -> None:
    window = 8
    text = "".join(chr(97 + i % 26) for i in range(length))
    tokens = [BOS_IDX, *text.encode()]

    lm = LoadedModelLM(loaded, max_length=window, batch_size=2)
    requests = make_requests("loglikelihood_rolling", (text,), ("another",))
    total = lm.loglikelihood_rolling(requests, disable_tqdm=True)[0]

    expected = 0.0
    # Targets 1..length, in windows of 8; the last window reaches back until it is full.
    for begin in range(1, length + 1, window):
        end = min(begin + window, length + 1)
        context_begin = 0 if begin == 1 else end - window - 1
        logprob, _ = direct_score(
            loaded, tokens[context_begin:begin], tokens[begin:end]
        )
        expected += logprob

    assert total == pytest.approx(expected, abs=1e-4)


def test_an_empty_text_has_no_loss(loaded: LoadedModel) -> None:
    requests = make_requests("loglikelihood_rolling", ("",))

    assert LoadedModelLM(loaded).loglikelihood_rolling(requests) == [0.0]


def test_prefix_token_can_be_chosen(loaded: LoadedModel) -> None:
    for prefix_token, idx in [("bos", BOS_IDX), ("eos", EOS_IDX), (65, 65)]:
        (actual,) = score(loaded, [("", "text")], prefix_token=prefix_token)
        expected = direct_score(loaded, [idx], list(b"text"))

        assert actual == pytest.approx(expected, abs=1e-4)


def test_texts_can_begin_with_the_beginning_of_sequence(loaded: LoadedModel) -> None:
    (actual,) = score(loaded, [("ab", "cd")], add_bos_token=True)
    expected = direct_score(loaded, [BOS_IDX, *b"ab"], list(b"cd"))

    assert actual == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive number or 'auto'"),
        ({"batch_size": "many"}, "`batch_size` must be a positive number or 'auto'"),
        ({"max_length": 0}, "`max_length` must be positive, but is 0"),
        ({"prefix_token": "pad"}, "`prefix_token` must be 'bos', 'eos' or a token id"),
        ({"prefix_token": 320}, r"`prefix_token` must be in \[0, 320\), but is 320"),
    ],
)
def test_a_wrong_option_is_explained(
    loaded: LoadedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LoadedModelLM(loaded, **options)


def test_a_response_cache_serves_one_model(
    load: Load, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = str(tmp_path_factory.mktemp("cache") / "responses.db")
    requests = make_requests("loglikelihood", *PAIRS)

    first = CachingLM(LoadedModelLM(load("xlstm"), batch_size=8), file)
    scores = first.loglikelihood(requests)
    assert scores == CachingLM(LoadedModelLM(load("xlstm")), file).loglikelihood(
        requests
    )

    with pytest.raises(ValueError, match="`use_cache` must name one file per model"):
        CachingLM(LoadedModelLM(load("gemma2")), file)

    with pytest.raises(ValueError, match="or of this one with other settings"):
        CachingLM(LoadedModelLM(load("xlstm"), max_length=10), file)
