"""Reading and writing run records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moxe_plugin.report.files import DamagedRecordError
from moxe_plugin.report.run_dirs import find_run_dirs, read_run, read_runs
from tests.report.synthetic import make_guess, make_trained, write


@pytest.mark.parametrize("record", [make_trained(), make_guess()], ids=lambda r: r.name)
def test_record_survives_writing_and_reading(record, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (run_dir,) = write(tmp_path, record)

    assert read_run(run_dir) == record


def test_run_directory_has_the_files_of_the_style_guide(tmp_path: Path) -> None:
    (run_dir,) = write(tmp_path, make_trained())

    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.yaml",
        "environment.json",
        "eval_instructions.json",
        "eval_pretrained.json",
        "items_moxe_embedded_last_word.csv",
        "model.json",
        "train.jsonl",
        "valid.jsonl",
    ]


def _truncate(file: Path) -> None:
    file.write_text(file.read_text()[:-20])


def _set_nan(file: Path) -> None:
    file.write_text(file.read_text().replace("6.0", "NaN"))


def _set(key: str, value: object) -> object:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return damage


_ITEMS = "items_moxe_embedded_last_word.csv"


def _replace(old: str, new: str) -> object:
    def damage(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return damage


def _drop(key: str) -> object:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("environment.json", Path.unlink, r"environment\.json is missing"),
        ("environment.json", _truncate, r"environment\.json: not valid JSON"),
        ("environment.json", _set("schema_version", 2), "must be 1, but is 2"),
        ("environment.json", _set("kind", "other"), "`kind` must be of type `RunKind`"),
        ("environment.json", _set("seed", "two"), "`seed` must be of type `int"),
        ("environment.json", _set("label", 3), "`label` must be of type `str`"),
        ("environment.json", _set("mood", 3), "`mood` is not known"),
        ("environment.json", _set("data", {}), "`name` is missing"),
        ("environment.json", _drop("label"), "`label` is missing"),
        ("environment.json", _drop("data"), "`data` is missing"),
        ("model.json", Path.unlink, r"model\.json is missing"),
        ("model.json", _set("num_parameters", True), "`num_parameters` must be of"),
        ("train.jsonl", _truncate, r"train\.jsonl: the last line is truncated"),
        ("train.jsonl", _set_nan, r"train\.jsonl, line 1: a value is NaN"),
        ("valid.jsonl", Path.unlink, r"valid\.jsonl is missing"),
        ("eval_pretrained.json", _truncate, r"eval_pretrained\.json: not valid JSON"),
        ("eval_pretrained.json", lambda f: f.write_text("[]"), "not a JSON object"),
        ("eval_pretrained.json", lambda f: f.write_bytes(b"\xff"), "is not UTF-8"),
        (_ITEMS, lambda f: f.write_text(""), "the last line is truncated"),
        (_ITEMS, lambda f: f.write_text(f.read_text()[:-3]), "line is truncated"),
        (_ITEMS, _replace("3,0", "3"), r"word\.csv, line 2: must have 4 values"),
        (_ITEMS, _replace("-7.12345", "nan"), "line 2: `nan` is not a finite"),
        (_ITEMS, _replace("-7.12345", "inf"), "line 2: `inf` is not a finite"),
        (_ITEMS, _replace("-7.12345", ""), "line 2: `` is not a finite number"),
        (_ITEMS, _replace("is_greedy", "mood"), "line 1: `item,logprob,num_tokens,m"),
        (_ITEMS, _replace("ba9876543210", "0123456789ab"), "line 3: .* of line 2"),
        (_ITEMS, _replace("ba9876543210", ""), "line 3: the item is missing"),
    ],
)
def test_damaged_run_is_named_and_leaves_the_others_alone(  # type: ignore[no-untyped-def]
    name: str, damage, reason: str, tmp_path: Path
) -> None:
    good, bad = write(tmp_path, make_trained("gemma2"), make_trained("moxe"))
    damage(bad / name)

    with pytest.raises(DamagedRecordError, match=reason):
        read_run(bad)

    records, damaged = read_runs(find_run_dirs(tmp_path))

    assert [record.name for record in records] == [good.name]
    assert [run.name for run in damaged] == [bad.name]


def test_directories_of_other_commands_are_no_runs(tmp_path: Path) -> None:
    (run_dir,) = write(tmp_path, make_trained())
    for name in ("claims", "routing", "speed", "tables", "work", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "LOG.md").touch()

    assert find_run_dirs(tmp_path) == [run_dir]


def test_items_are_a_line_each_with_six_digits(tmp_path: Path) -> None:
    (run_dir,) = write(tmp_path, make_trained())

    assert (run_dir / _ITEMS).read_text() == (
        "item,logprob,num_tokens,is_greedy\n"
        "0123456789ab,-7.12345,3,0\n"
        "ba9876543210,-0.000123456,1,1\n"
    )


def test_record_replaces_what_an_earlier_one_of_its_name_left(tmp_path: Path) -> None:
    record = make_trained()
    (run_dir,) = write(tmp_path, record)
    (run_dir / "eval_other.json").write_text("{}")
    (tmp_path / f".{record.name}.part").mkdir()
    (tmp_path / f".{record.name}.part" / "eval_other.json").write_text("{}")

    write(tmp_path, record)

    assert read_run(run_dir) == record
    assert [path.name for path in tmp_path.iterdir()] == [record.name]
