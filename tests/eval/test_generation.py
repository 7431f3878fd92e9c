"""Tests of moxe_plugin/eval/generation.py, through the harness' interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout

from moxe_plugin.eval import generation
from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.generation import GenerationOptions
from moxe_plugin.eval.scoring import measure_state_bytes
from moxe_plugin.eval.text_codec import TextCodec
from tests.common import BOS_IDX, EOS_IDX
from tests.eval.conftest import Load
from tests.eval.requests import make_requests

FAMILIES = ["moxe", "xlstm", "gemma2", "qwen_moe"]

PROMPTS = ["The state", "x", "is carried along from token to token", ""]


def direct_tokens(loaded: LoadedModel, prompt: str, max_gen_toks: int) -> list[int]:
    """Take the most likely token again and again, reading everything each time."""
    device = next(loaded.model.parameters()).device
    tokens = [*prompt.encode()] or [BOS_IDX]
    begin = len(tokens)

    while len(tokens) < begin + max_gen_toks:
        seqs = torch.tensor([tokens], device=device)
        with torch.no_grad():
            logits = loaded.model(seqs, BatchLayout.of(seqs))
        assert isinstance(logits, torch.Tensor)

        token = int(logits[0, -1].argmax())
        if token == EOS_IDX:
            break
        tokens.append(token)

    return tokens[begin:]


def generate(
    loaded: LoadedModel,
    prompts: list[str],
    gen_kwargs: Mapping[str, Any],
    **options: Any,
) -> list[str]:
    """Continue prompts through the harness' interface."""
    lm = LoadedModelLM(loaded, **options)
    requests = make_requests(
        "generate_until", *[(p, dict(gen_kwargs)) for p in prompts]
    )

    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_argmax_loop(load: Load, family: str) -> None:
    loaded = load(family)
    decode = loaded.tokenizer.create_decoder()

    # Four prompts of four lengths in batches of three.
    actual = generate(loaded, PROMPTS, {"max_gen_toks": 8}, batch_size=3)

    for prompt, text in zip(PROMPTS, actual, strict=True):
        assert text == decode(torch.tensor(direct_tokens(loaded, prompt, 8)))


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_the_batch_size_changes_no_text(
    loaded: LoadedModel, batch_size: int | str
) -> None:
    one_batch = generate(loaded, PROMPTS, {"max_gen_toks": 20}, batch_size=4)

    assert one_batch == generate(
        loaded, PROMPTS, {"max_gen_toks": 20}, batch_size=batch_size
    )


@pytest.mark.parametrize(("family", "sizes"), [("moxe", [3, 1]), ("gemma2", [4])])
def test_states_of_a_batch_stay_within_their_budget(
    load: Load, monkeypatch: pytest.MonkeyPatch, family: str, sizes: list[int]
) -> None:
    loaded = load(family)
    codec = TextCodec(loaded.tokenizer, None, False)
    prompts = [([1, 2], GenerationOptions(max_gen_toks=2))] * 4

    state_bytes = measure_state_bytes(loaded.model)
    assert (state_bytes > 0) == (family == "moxe")

    seen: list[int] = []

    def note_size(_: object, batch: Sequence[object], *__: object) -> list[list[int]]:
        seen.append(len(batch))

        return [[] for _ in batch]

    monkeypatch.setattr(generation, "generate", note_size)

    generation.generate_in_batches(
        loaded.model,
        prompts,
        codec,
        batching=Batching(
            batch_size="auto",
            vocab_size=codec.vocab_size,
            max_state_bytes=3 * state_bytes,
        ),
        on_generated=lambda *_: None,
    )

    assert seen == sizes


def test_generation_stops_before_a_stop_string(loaded: LoadedModel) -> None:
    (full,) = generate(loaded, ["abc"], {"until": [], "max_gen_toks": 20})
    stop = full[5:7]

    (stopped,) = generate(loaded, ["abc"], {"until": [stop], "max_gen_toks": 20})

    assert stopped == full[: full.index(stop)]


def test_a_long_prompt_leaves_room_to_generate(loaded: LoadedModel) -> None:
    gen_kwargs = {"until": [], "max_gen_toks": 6}

    cut = generate(loaded, ["long " * 9 + "prompt"], gen_kwargs, max_length=12)

    assert cut == generate(loaded, ["prompt"], gen_kwargs)


def test_sampling_follows_the_seed(loaded: LoadedModel) -> None:
    gen_kwargs = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 30}

    torch.manual_seed(1)
    first = generate(loaded, ["abc"], gen_kwargs)
    second = generate(loaded, ["abc"], gen_kwargs)
    torch.manual_seed(1)

    assert first == generate(loaded, ["abc"], gen_kwargs)
    assert first != second


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_among_one_token_is_greedy(
    loaded: LoadedModel, limit: dict[str, float]
) -> None:
    sampled = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 10, **limit}

    assert generate(loaded, PROMPTS, sampled) == generate(
        loaded, PROMPTS, {"max_gen_toks": 10}
    )


def test_the_default_limit_fits_the_model(loaded: LoadedModel) -> None:
    lm = LoadedModelLM(loaded)

    assert lm.max_gen_toks == min(256, loaded.model.max_seq_len // 2)


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"num_beams": 4}, "but have `num_beams` too"),
        ({"max_gen_toks": 0}, "`max_gen_toks` must be positive"),
        (
            {"do_sample": True, "temperature": -1.0},
            "`temperature` must not be negative",
        ),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
        ({"top_k": 0}, "`top_k` must be positive"),
        ({"max_gen_toks": 9999}, "`max_gen_toks` must be less than `max_length`"),
    ],
)
def test_a_wrong_generation_argument_is_explained(
    loaded: LoadedModel, gen_kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(loaded, ["abc"], gen_kwargs)


def test_without_sampling_the_temperature_is_ignored() -> None:
    options = GenerationOptions.parse({"do_sample": False, "temperature": 0.8}, 5)

    assert options == GenerationOptions(max_gen_toks=5)
