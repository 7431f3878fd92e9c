"""Runs `lm generate` on the tiny pretrained model."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fairseq2.recipe.error import RecipeError
from fairseq2.utils.validation import ValidationError

from moxe_plugin.train.generate.prompts import read_prompts
from moxe_plugin.train.launch import load_preset, run_recipe

_PROMPTS = ["The double", "The double of 3 is"]


def _generate(
    pretrained_dir: Path,
    output_dir: Path,
    preset: str | None,
    overrides: Mapping[str, object],
) -> list[dict[str, Any]]:
    config = load_preset(
        preset,
        {
            "pretrained.source": str(pretrained_dir),
            "seq_generator.config.max_gen_len": 6,
            "common.torch.num_threads": 1,
            **overrides,
        },
        recipe="lm/generate",
    )

    run_recipe("lm/generate", config, output_dir, quiet=True)

    lines = output_dir.joinpath("output", "rank_0.jsonl").read_text().splitlines()

    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("preset", [None, "generate/greedy", "generate/beam"])
def test_every_prompt_is_completed(
    pretrained_dir: Path,
    tmp_path: Path,
    preset: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = _generate(pretrained_dir, tmp_path, preset, {"prompts": _PROMPTS})

    assert [r["prompt"] for r in records] == _PROMPTS
    assert all(1 <= r["num_tokens"] <= 12 for r in records)

    out = capsys.readouterr().out

    assert f"> {_PROMPTS[1]}\n{records[1]['text']}\n" in out


def test_greedy_completion_does_not_depend_on_the_batch(
    pretrained_dir: Path, tmp_path: Path
) -> None:
    texts = []

    for batch_size in (1, 2):
        overrides = {
            "prompts": ["The square of 7", "The double of 3"],
            "batch_size": batch_size,
        }

        records = _generate(pretrained_dir, tmp_path, "generate/greedy", overrides)

        texts.append([r["text"] for r in records])

    assert texts[0] == texts[1]


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_streamed_text_is_that_of_the_records(
    pretrained_dir: Path,
    tmp_path: Path,
    num_prompts: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs, texts = [], []

    for stream in (False, True):
        overrides = {
            "prompts": _PROMPTS[:num_prompts],
            "batch_size": 1,
            "stream": stream,
        }
        output_dir = tmp_path / str(stream)

        records = _generate(pretrained_dir, output_dir, "generate/greedy", overrides)

        texts.append([r["text"] for r in records])
        outputs.append(capsys.readouterr().out)

    assert texts[0] == texts[1]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("preset", "num_prompts", "expected"),
    [("greedy", 1, True), ("greedy", 2, False), ("beam", 1, False)],
)
def test_text_is_streamed_for_one_prompt_on_a_terminal(
    pretrained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    num_prompts: int,
    expected: bool,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    sink = Terminal()
    monkeypatch.setattr("sys.stdout", sink)

    sizes = []
    write = sink.write
    monkeypatch.setattr(sink, "write", lambda text: sizes.append(write(text)))

    overrides: dict[str, object] = {"prompts": _PROMPTS[:num_prompts]}

    _generate(pretrained_dir, tmp_path, f"generate/{preset}", overrides)

    # In one piece per prompt otherwise
    assert (len(sizes) > 2) == expected


def test_beam_search_is_not_streamed(pretrained_dir: Path, tmp_path: Path) -> None:
    overrides = {"prompts": _PROMPTS, "stream": True}

    with pytest.raises(ValidationError, match="`stream` must be false"):
        _generate(pretrained_dir, tmp_path, "generate/beam", overrides)


def test_too_long_prompt_is_refused(pretrained_dir: Path, tmp_path: Path) -> None:
    overrides: dict[str, object] = {"prompts": ["\t" * 64]}

    with pytest.raises(RecipeError, match="must have between 1 and 63 tokens"):
        _generate(pretrained_dir, tmp_path, None, overrides)


def test_prompts_are_read_from_text_and_from_jsonl(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"

    text.write_text("one\n\ntwo\n")
    jsonl.write_text('{"prompt": "one"}\n{"src": "two", "tgt": "three"}\n')

    assert read_prompts(text) == read_prompts(jsonl) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", r"a\.jsonl:1 is not valid JSON"), ('{"tgt": "a"}', "must be a JSON object")],
    ids=["not_json", "no_prompt"],
)
def test_unreadable_prompts_are_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line)

    with pytest.raises(RecipeError, match=message):
        read_prompts(file)


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" \n")

    with pytest.raises(RecipeError, match=r"must have a prompt, but '.*' has none"):
        read_prompts(file)

    file.write_bytes(b"\xff")

    with pytest.raises(RecipeError, match="`prompt_file` must be UTF-8"):
        read_prompts(file)


def test_missing_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`prompt_file` must be a text file"):
        read_prompts(tmp_path / "nothing.txt")
