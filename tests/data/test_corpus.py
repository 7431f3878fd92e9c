"""Tests of the embedded corpus: what is read, cleaned, held out and cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moxe_plugin.data import corpus as corpus_module
from moxe_plugin.data.cleaning import Cleaner, find_first_sentence
from moxe_plugin.data.corpus import (
    EmbeddedData,
    EmbeddedSpec,
    get_cache_dir,
    prepare_corpus,
    prepare_embedded,
)
from moxe_plugin.data.documentation import (
    STDLIB,
    DocEntry,
    list_files,
    read_docstrings,
    read_topics,
)
from moxe_plugin.data.gathering import Corpus
from moxe_plugin.data.shards import open_shards

SPEC = EmbeddedSpec(
    sources=("email", "rich"),
    max_chars=60_000,
    vocab_size=400,
    max_train_questions=50,
    max_valid_questions=10,
)

PROSE = """\
This is what the function does with the path that it is given, and why it
should not be called with anything else than a path of the file system."""


def test_docstrings_are_read_without_import(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        '''"""The module."""
raise RuntimeError("never run")

if True:
    def f(a, /, b, *args, c=1, **kwargs):
        """The function."""

class C:
    """The class."""

    def g(self, x):
        """The method."""

    def _h(self):
        """Private."""
'''
    )

    assert list(read_docstrings("p.m", file)) == [
        DocEntry("module", "p.m", "", "The module."),
        DocEntry("function", "p.m.f", "(a, b, c)", "The function."),
        DocEntry("class", "p.m.C", "", "The class."),
        DocEntry("function", "p.m.C.g", "(x)", "The method."),
    ]

    file.write_text("def (")

    assert list(read_docstrings("p.m", file)) == []


def test_standard_library_is_found_without_tests_and_packages() -> None:
    modules = [m for m, _ in list_files(STDLIB)]

    assert "json" in modules
    assert "json.decoder" in modules
    assert not [m for m in modules if "site-packages" in m or ".test." in m]
    assert list_files("a_package_nobody_has") == []


def test_topics_are_sections() -> None:
    headings = [e.name for e in read_topics()]

    assert len(headings) > 100
    assert 'The "if" statement' in headings


def test_cleaning_keeps_prose() -> None:
    text = Cleaner().clean(
        f"""Summary
        -------
        {PROSE}

        .. note:: {PROSE} Still, mind the ``path``.

        >>> f(1)
        2

        x = {{1: [2, 3], 4: (5, 6)}}; y[0] += 1
        """
    )

    assert text is not None
    assert PROSE.splitlines()[0] in text
    assert not [s for s in (">>>", "---", "``", "y[0]") if s in text]


def test_cleaning_drops_duplicates_other_languages_and_crumbs() -> None:
    cleaner = Cleaner()

    assert cleaner.clean(PROSE) is not None
    assert cleaner.clean(PROSE) is None
    assert cleaner.clean(PROSE.upper().replace(" ", "  ") + " 42") is None
    assert cleaner.clean("Return the path.") is None
    assert cleaner.clean("Diese Funktion gibt einen Pfad aus. " * 8) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return\nthe path.  More.", "Return the path."),
        ("Return os.path now. More.", "Return os.path now."),
        ("Use it (e.g. here). More.", None),
        ("no capital.", None),
        ("No end", None),
    ],
)
def test_first_sentence_is_found(text: str, sentence: str | None) -> None:
    assert find_first_sentence(text) == sentence


def test_held_out_questions_are_not_about_training_text(tmp_path: Path) -> None:
    corpus = Corpus()

    for idx in range(400):
        word = "".join(chr(97 + int(d)) for d in f"{idx:03}")
        answer = f"Return the {word} of the path that is given to it."
        long = f"{answer}\n\n{PROSE} It has {word} in it, and the {word} of it."
        # Some have nothing but the answer, which is too short for the corpus.
        text = answer if idx % 2 else long
        corpus.add(DocEntry("function", f"m.{word}", "(x)", text))

    counts = corpus.questions.write(tmp_path / "q", corpus.cleaner, 1000, 1000)
    lines = tmp_path.joinpath("q", "valid.jsonl").read_text().splitlines()
    train_text = " ".join(d.text for d in corpus.documents if d.split == "train")

    assert counts["train"] + counts["valid"] == 400
    assert len(lines) == counts["valid"] > 10
    assert not [x for x in lines if json.loads(x)["tgt"] in train_text]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedData:
    return prepare_corpus("small", SPEC, tmp_path_factory.mktemp("small"))


def test_corpus_is_complete_and_splits_are_disjoint(small: EmbeddedData) -> None:
    shards = open_shards(small.tokens_dir, verify=True)
    manifest = small.read_manifest()

    assert {n: s.num_tokens for n, s in shards.manifest.splits.items()} == manifest[
        "num_tokens"
    ]
    assert list(manifest["packages"]) == ["rich", "tokenizers"]
    assert manifest["num_chars"] >= SPEC.max_chars
    assert manifest["num_instructions"]["train"] == SPEC.max_train_questions

    test = [json.loads(x) for x in small.test_jsonl.read_text().splitlines()]
    info = shards.manifest.splits["test"]

    assert len(test) == info.num_documents
    assert sum(len(d["text"].encode()) for d in test) == info.num_bytes


def test_build_is_deterministic(small: EmbeddedData, tmp_path: Path) -> None:
    again = prepare_corpus("small", SPEC, tmp_path)

    assert again.path.name == small.path.name
    assert again.read_manifest() == small.read_manifest()


def test_cache_is_used_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []

    def build(_spec: object, _origin: object, data: EmbeddedData) -> None:
        builds.append(data)
        data.path.joinpath("x").write_text("text")
        data.path.joinpath("manifest.json").write_text(
            '{"files": {"x": {"num_bytes": 4}}}'
        )

    monkeypatch.setattr(corpus_module, "_build", build)

    path = prepare_embedded(cache_dir=tmp_path).path
    assert prepare_embedded(cache_dir=tmp_path).path == path
    assert len(builds) == 1

    path.joinpath("x").write_text("tex")
    prepare_embedded(cache_dir=tmp_path)
    assert len(builds) == 2
    assert path.joinpath("x").read_text() == "text"

    monkeypatch.setattr(corpus_module, "get_versions", lambda _: {"numpy": "99"})
    assert prepare_embedded(cache_dir=tmp_path).path != path
    assert len(builds) == 3

    with pytest.raises(ValueError, match="`size` must be one of quickstart, full"):
        prepare_embedded("tiny")  # type: ignore[arg-type]  # the mistake under test


def test_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOXE_CACHE_DIR", str(tmp_path))
    assert get_cache_dir() == tmp_path

    monkeypatch.delenv("MOXE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_cache_dir() == tmp_path / "moxe_plugin"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert get_cache_dir() == tmp_path / ".cache" / "moxe_plugin"
