"""Tests of moxe_plugin/eval/tasks.py and of the files in eval_tasks/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from moxe_plugin.data.corpus import EmbeddedData
from moxe_plugin.eval import tasks
from moxe_plugin.resources import resource_dir

TASKS = [
    "moxe_embedded_last_word",
    "moxe_embedded_rolling",
    "moxe_fineweb_edu_256",
    "moxe_lambada",
    "moxe_multiple_choice",
]

TEXTS = ["The first document.", "A second, longer document. " * 9, "Third."]


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put some documents in the place of the embedded corpus."""
    data = EmbeddedData(tmp_path)
    data.test_jsonl.parent.mkdir()
    data.test_jsonl.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    monkeypatch.setattr(tasks, "prepare_embedded", lambda _: data)

    return data.test_jsonl


def test_every_task_is_found_and_in_the_readme() -> None:
    directory = resource_dir("eval_tasks")
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    readme = directory.joinpath("README.md").read_text()

    assert manager.all_subtasks == TASKS
    assert all(f"| `{name}` |" in readme for name in TASKS)


@pytest.mark.usefixtures("documents")
def test_rolling_takes_documents_that_fit() -> None:
    every = tasks.load_embedded_documents(10_000, "quickstart", version=1.0)["test"]
    some = tasks.load_embedded_documents(30, "quickstart")["test"]

    assert sorted(every["text"]) == sorted(TEXTS)
    assert sorted(some["text"]) == ["The first document.", "Third."]


def test_a_last_word_ends_a_sentence_late_in_the_document() -> None:
    start = " ".join(f"w{i}" for i in range(19))
    text = f"{start} early end. Then\nnewline. It is no `code`. We go on. See 3.2 too."

    words = [word for _, word in tasks.find_last_words(text)]
    contexts = [context for context, _ in tasks.find_last_words(text)]

    # `on` has two letters, `newline` follows a line break, `code` is quoted.
    assert words == ["end", "too"]
    assert contexts[0] == f"{start} early"
    assert contexts[1].endswith("See 3.2")


def test_a_long_context_keeps_its_end_and_its_line_breaks() -> None:
    text = "a " * 300 + "b\n" * 25 + "c last."

    ((context, word),) = tasks.find_last_words(text)

    assert (context, word) == ("a " * 24 + "b\n" * 25 + "c", "last")


def test_lambada_and_fineweb_read_a_local_file(documents: Path) -> None:
    file = str(documents)

    assert tasks.load_lambada(file=file, checkpoint="x")["test"]["text"][:] == TEXTS
    some = tasks.load_fineweb_edu(max_documents=2, file=file)["test"]
    assert some["text"][:] == TEXTS[:2]


def test_multiple_choice_reads_a_local_file(tmp_path: Path) -> None:
    question = {"query": "Question: why?\n", "choices": ["so", "or so"], "gold": 1}
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(question) + "\n")

    assert list(tasks.load_multiple_choice(file=str(file))["test"]) == [question]

    file.write_text(json.dumps(question) + "\n" + json.dumps({**question, "gold": 2}))
    with pytest.raises(ValueError, match=r"line 2: must be a JSON object with `query`"):
        tasks.load_multiple_choice(file=str(file))

    with pytest.raises(ValueError, match="`file` must be given"):
        tasks.load_multiple_choice()
