"""The benchmark of shared beginnings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moxe_plugin.eval.agreement import read_last_words
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.report.files import read_json
from moxe_plugin.speed import sharing, sharing_records
from moxe_plugin.speed.sharing import measure_sharing, read_questions
from tests.common import ByteTokenizer
from tests.models.families import create_model

QUESTIONS = [
    {
        "query": "Question: What does one write on?\n",
        "choices": ["A sheet of paper", "A sheet of wind", "Paper"],
        "gold": 0,
    },
    {"query": "Question: Where is it?\n", "choices": ["Here", "There"], "gold": 1},
]


def _write_lines(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return file


@pytest.fixture(scope="module")
def loaded(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
) -> LoadedModel:
    """Return a tiny random xLSTM over bytes."""
    return _load("xlstm")


def _load(family: str) -> LoadedModel:
    torch.manual_seed(2)
    model = create_model(family, dtype=torch.float32).eval()

    return LoadedModel(model, ByteTokenizer(), family, None, {"model_family": family})


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Write the questions into a file."""
    return _write_lines(tmp_path / "questions.jsonl", QUESTIONS)


def test_questions_are_asked_as_the_task_asks_them(questions: Path) -> None:
    pairs = read_questions(questions, None)

    assert len(pairs) == 5
    assert pairs[1] == (
        "Question: What does one write on?\nAnswer:",
        " A sheet of wind",
    )

    assert read_questions(questions, None, max_choice_chars=5) == pairs[3:]
    assert read_questions(questions, 1) == pairs[:3]


def test_sharing_computes_each_beginning_once(
    loaded: LoadedModel, questions: Path
) -> None:
    pairs = read_questions(questions, None)

    row = measure_sharing(loaded, "questions.jsonl", "multiple_choice", pairs)

    # A token is a byte. Of an answer the last token is not read.
    texts = [(context + continuation)[:-1] for context, continuation in pairs]
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}

    assert row.num_requests == 5
    assert row.tokens_alone == sum(map(len, texts))
    assert row.tokens_shared == len(beginnings)
    assert row.agrees
    assert row.seconds_alone > 0.0

    # No answer has fewer tokens than a blank and "Here", and none is likelier than 1.
    assert row.max_difference_per_token_nats <= row.max_difference_nats / 5
    assert row.max_relative_difference <= row.max_difference_nats


def test_differences_are_told_absolutely_relatively_and_per_token(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A token is a byte.
    pairs = [("a", " 23456789"), ("a", " 2")]
    scores = {
        False: [(-300.0, False), (-0.5, True)],
        True: [(-309.0, False), (-4, True)],
    }

    monkeypatch.setattr(
        "moxe_plugin.eval.agreement.score_pairs",
        lambda lm, _: scores[lm.get_model_info()["share_prefixes"]],
    )

    row = measure_sharing(loaded, "", "multiple_choice", pairs)

    assert row.max_difference_nats == pytest.approx(9.0)
    # 3.5 of a nat, and 9 of 300; 3.5 of 2 tokens, and 9 of 9.
    assert row.max_relative_difference == pytest.approx(3.5)
    assert row.max_difference_per_token_nats == pytest.approx(1.75)
    assert not row.agrees


def test_command_writes_what_it_measured(
    loaded: LoadedModel,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "moxe_plugin.eval.checkpoints.load_checkpoint", lambda _: loaded
    )
    lambada = _write_lines(
        tmp_path / "lambada.jsonl", [{"text": "It is here"}, {"text": "It is there"}]
    )

    status = sharing.main(
        [
            *("run", "--questions", str(questions), "--lambada", str(lambada)),
            *("--out", str(tmp_path / "speed"), "--name", "both"),
        ]
    )

    assert status == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" times")[0][:29] for line in lines] == [
        "same scores: questions.jsonl:",
        "same scores: lambada.jsonl: 1",
    ]

    record = read_json(tmp_path / "speed" / "both.json")
    assert [row["num_requests"] for row in record["rows"]] == [5, 2]
    assert record["model"]["num_parameters"] > 0

    page = (tmp_path / "speed" / "both.md").read_text(encoding="utf-8")
    for row in record["rows"]:
        assert f"| {row['max_relative_difference']:.1e} |" in " ".join(page.split())
        assert f"| {row['tokens_alone']:,} | {row['tokens_shared']:,} |" in " ".join(
            page.split()
        )


def test_other_scores_are_told(
    loaded: LoadedModel,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "moxe_plugin.eval.checkpoints.load_checkpoint", lambda _: loaded
    )
    monkeypatch.setattr(sharing_records, "TOLERANCE", -1.0)

    status = sharing.main(
        ["run", "--questions", str(questions), "--out", str(tmp_path)]
    )

    assert status == 1
    assert capsys.readouterr().out.startswith("OTHER SCORES: questions.jsonl")


def test_command_without_a_file_tells_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sharing.main(["run", "--out", str(tmp_path)]) == 2

    assert "`--questions` or `--lambada` must name a file" in capsys.readouterr().err


@pytest.mark.usefixtures("fairseq2_setup")
def test_model_without_state_is_refused(questions: Path) -> None:
    pairs = read_questions(questions, None)

    with pytest.raises(ValueError, match=r"`share_prefixes` must be false"):
        measure_sharing(_load("gemma2"), "", "multiple_choice", pairs)


def test_passages_lose_their_last_word(tmp_path: Path) -> None:
    file = _write_lines(tmp_path / "lambada.jsonl", [{"text": "It is here"}])

    assert read_last_words(file, None) == [("It is", " here")]
