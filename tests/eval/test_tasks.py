"""Tests of moxe_plugin/eval/tasks.py and of the files in eval_tasks/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from moxe_plugin.data.corpus import EmbeddedData
from moxe_plugin.data.instruction_encoding import read_instructions
from moxe_plugin.eval import tasks
from moxe_plugin.resources import resource_dir

TASKS = [
    "moxe_embedded_last_word",
    "moxe_embedded_rolling",
    "moxe_fineweb_edu_256",
    "moxe_gsm8k",
    "moxe_lambada",
    "moxe_multiple_choice",
    "moxe_rolling",
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

    long = {**question, "choices": ["so", "or not so"]}
    file.write_text(json.dumps(long) + "\n" + json.dumps(question) + "\n")
    kept = tasks.load_multiple_choice(file=str(file), max_choice_chars=5)["test"]
    assert list(kept) == [question]

    file.write_text(json.dumps(question) + "\n" + json.dumps({**question, "gold": 2}))
    with pytest.raises(ValueError, match=r"line 2: must be a JSON object with `query`"):
        tasks.load_multiple_choice(file=str(file))

    with pytest.raises(ValueError, match="`file` must be given"):
        tasks.load_multiple_choice()


def test_rolling_reads_a_local_file(documents: Path) -> None:
    assert tasks.load_documents(file=str(documents))["test"]["text"][:] == TEXTS

    with pytest.raises(ValueError, match="`file` must be given"):
        tasks.load_documents()


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("9 - 2 = 7 and 7 * 180 is\n#### 1260", True),
        ("#### 1,260", True),
        ("#### 1260.", True),
        ("#### 1260\n\nQ", True),
        ("The answer is 1260", False),
        ("#### 12600", False),
        ("#### 1260.5", False),
        ("#### -1260", False),
        ("#### $1260", False),
        ("#### 3\n#### 1260", False),
    ],
)
def test_gsm8k_takes_the_number_behind_the_mark(
    answer: str, is_right: bool, tmp_path: Path
) -> None:
    line = {"question": "How many?", "answer": "7 * 180 = 1260\n#### 1,260"}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(line) + "\n")
    manager = TaskManager(
        include_path=str(resource_dir("eval_tasks")),
        include_defaults=False,
        metadata={"file": str(file)},
    )
    task = manager.load(["moxe_gsm8k"])["tasks"]["moxe_gsm8k"]
    task.build_all_requests()
    (request,) = task.instances

    # As the instructions ask it.
    assert request.args[0] == "Question: How many?\nAnswer:"
    (piece, _) = next(read_instructions(file)).pieces
    assert piece.text == request.args[0]

    request.resps = [answer]
    task.apply_filters()

    (doc,) = task.test_docs()
    metrics = task.process_results(doc, [request.filtered_resps["strict"]])
    assert metrics["exact_match"] == float(is_right)
