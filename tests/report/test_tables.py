"""Tables from run records, cell by cell."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from moxe_plugin.report.__main__ import main
from moxe_plugin.report.cells import comparison_cells, shown_columns, suite_frame
from moxe_plugin.report.columns import COLUMNS_BY_KEY
from moxe_plugin.report.comparison import Comparison, compare
from moxe_plugin.report.pair_tables import pairs_frame
from moxe_plugin.report.records import Code, DamagedRun, RunRecord
from moxe_plugin.report.run_dirs import find_run_dirs, read_runs
from moxe_plugin.report.suite_page import suite_latex, suite_markdown
from moxe_plugin.report.tables import write_tables
from moxe_plugin.report.terminal import print_results
from tests.report.synthetic import DATA, make_guess, make_trained, write
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored


def _compare(*records: RunRecord) -> Comparison:
    (suite,) = compare(records, [])
    (comparison,) = suite.comparisons

    return comparison


def _cells(*records: RunRecord) -> pd.DataFrame:
    cells: pd.DataFrame = comparison_cells(_compare(*records)).set_index("system")

    return cells


def test_cells_of_one_run() -> None:
    comparison = _compare(make_trained())
    cells = comparison_cells(comparison, shown_columns(comparison))

    assert cells.set_index("system").loc["Moxe"].to_dict() == {
        "seeds": "2",
        "parameters": "1,900,000",
        "active": "800,000",
        "training tokens": "40,960",
        "train loss, nats": "3.900",
        "valid loss, nats": "4.000",
        "perplexity per token": "54.6",
        "instruction loss, nats": "4.500",
        "after finetuning, nats": "3.000",
        # exp(7.123573 / 2) of two words, exp(7.123573 / 4) of four tokens
        "last-word perplexity per word": "35",
        "last-word perplexity per token": "5.9",
        "last-word accuracy": "50.00%",
        "test bits per byte": "2.346",
        "test perplexity per word": "1,500",
        "tokens/s": "1,234",
        "peak memory, GiB": "1.25",
        "wall time, s": "46",
    }


def test_cells_of_two_seeds_are_mean_and_sample_deviation() -> None:
    cells = _cells(make_trained(seed=2, loss=4.0), make_trained(seed=3, loss=4.2))

    assert cells.loc["Moxe", "seeds"] == "2, 3"
    # sqrt((0.1**2 + 0.1**2) / 1) = 0.141
    assert cells.loc["Moxe", "valid loss, nats"] == "4.100 ± 0.141"
    # exp(4) = 54.598 and exp(4.2) = 66.686
    assert cells.loc["Moxe", "perplexity per token"] == "60.6 ± 8.5"
    assert cells.loc["Moxe", "parameters"] == "1,900,000"


def test_missing_number_is_a_dash_and_never_zero() -> None:
    record = replace(make_trained(), evals={}, items={}, valid=[])
    cells = _cells(record, make_guess())

    for heading in ("valid loss, nats", "last-word accuracy", "after finetuning, nats"):
        assert cells.loc["Moxe", heading] == "—"

    for heading in ("parameters", "last-word accuracy", "tokens/s", "wall time, s"):
        assert cells.loc["uniform guess", heading] == "—"

    assert cells.loc["uniform guess", "perplexity per token"] == "2,048.0"


def test_number_that_some_seeds_lack_says_so() -> None:
    complete = make_trained(seed=2)
    cells = _cells(complete, replace(make_trained(seed=3), evals={}))

    assert cells.loc["Moxe", "test bits per byte"] == "2.346 (1 of 2)"


def test_rows_are_sorted_by_loss_with_guesses_below() -> None:
    cells = _cells(
        make_guess("uniform", 7.6),
        make_guess("unigram", 3.0),
        make_trained("gemma2", loss=4.5),
        make_trained("moxe", loss=4.0),
    )

    assert list(cells.index) == ["Moxe", "Gemma2", "unigram guess", "uniform guess"]


@pytest.mark.parametrize(
    "change",
    [
        {"data": replace(DATA, train_sha256="d" * 64)},
        {"data": replace(DATA, tokenizer_sha256="d" * 64)},
        {"training_tokens": 81920},
    ],
    ids=["text", "tokenizer", "tokens"],
)
def test_runs_on_other_data_stand_in_another_table(change: dict[str, Any]) -> None:
    records = [make_trained("gemma2"), make_trained("moxe", **change)]
    (suite,) = compare(records, [])

    assert [len(c.rows) for c in suite.comparisons] == [1, 1]
    assert "do not compare with each other" in suite_markdown(suite)
    assert list(suite_frame(suite)["comparison"]) == [1, 2]


def test_guess_stands_in_each_table_on_its_data() -> None:
    records = [
        make_guess(),
        make_trained("moxe"),
        make_trained("gemma2", training_tokens=81920),
    ]
    (suite,) = compare(records, [])

    assert [len(c.rows) for c in suite.comparisons] == [2, 2]


def test_other_recipe_makes_another_row_and_a_note() -> None:
    records = [
        make_trained(seed=2),
        replace(
            make_trained(seed=3, recipe_sha256="other"), name="moxe_embedded_other_s3"
        ),
    ]
    (suite,) = compare(records, [])

    assert len(suite.comparisons[0].rows) == 2
    assert "Moxe stands in several rows, whose configurations differ." in (
        suite.comparisons[0].notes
    )


def test_other_code_and_machine_are_noted() -> None:
    record = make_trained("moxe")
    env = record.environment
    other = make_trained(
        "gemma2",
        code=replace(env.code, commit="fedcba", dirty=True),
        hardware=replace(env.hardware, num_threads=8),
    )
    (suite,) = compare([record, other], [])

    page = suite_markdown(suite)

    assert "different code: 0.1.0 (0123abc), 0.1.0 (fedcba)" in page
    assert "1 of 2 runs come from code with uncommitted changes" in page
    assert "times and memory do not compare" in page


def test_repeated_seed_counts_once_and_is_named() -> None:
    older = replace(make_trained(loss=9.0), name="moxe_embedded_cpu2_20261101_s2")
    (suite,) = compare([make_trained(loss=4.0), older], [])

    (row,) = suite.comparisons[0].rows

    assert row.run_names == ["moxe_embedded_cpu2_20261123_s2"]
    assert [run.name for run in suite.excluded] == [older.name]


def test_page_names_every_run_and_every_excluded_one() -> None:
    damaged = DamagedRun(name="broken_run", reason="train.jsonl is missing.")
    (suite,) = compare([make_trained(), make_guess()], [damaged])

    page = suite_markdown(suite)

    assert "- Moxe: `moxe_embedded_cpu2_20261123_s2`" in page
    assert "- uniform guess: `uniform_embedded_cpu2_20261123`" in page
    assert "- `broken_run`: train.jsonl is missing." in page
    assert "Note: One seed: differences between rows may be chance." in page


def test_markdown_table_is_exact() -> None:
    (suite,) = compare([make_guess()], [])

    lines = suite_markdown(suite).splitlines()
    table = [line for line in lines if line.startswith("|")]

    # What a guess has no number for makes no column.
    assert [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table
    ] == [
        ["system", "seeds", "valid loss, nats", "perplexity per token"],
        [
            ":--------------",
            ":--------",
            "-------------------:",
            "-----------------------:",
        ],
        ["uniform guess", "—", "7.625", "2,048.0"],
        ["system", "seeds", "test bits per byte"],
        [":--------------", ":--------", "---------------------:"],
        ["uniform guess", "—", "3.500"],
    ]


def test_csv_has_unrounded_numbers_and_empty_cells(tmp_path: Path) -> None:
    records = [make_trained(seed=2, loss=4.0), make_trained(seed=3, loss=4.2)]
    write_tables([*records, make_guess()], [], tmp_path / "tables")

    frame = pd.read_csv(tmp_path / "tables" / "quickstart.csv").set_index("system")

    assert frame.loc["moxe", "valid_loss_nats"] == pytest.approx(4.1)
    assert frame.loc["moxe", "valid_loss_nats_sd"] == pytest.approx(math.sqrt(0.02))
    assert frame.loc["moxe", "valid_loss_nats_runs"] == 2
    assert frame.loc["moxe", "runs"] == " ".join(record.name for record in records)
    assert math.isnan(frame.loc["uniform", "parameters"])
    assert frame.loc["uniform", "parameters_runs"] == 0


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [make_trained(), make_trained("gemma2", seed=3), make_guess()]

    write_tables(records, [], tmp_path / "one" / "tables")
    write_tables(records[::-1], [], tmp_path / "two" / "tables")

    one, two = (_read_all(tmp_path / d / "tables") for d in ("one", "two"))

    assert len(one) > 10
    assert one == two


def test_terminal_shows_the_rows() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_results(compare([make_trained(), make_guess()], []), Path("tables"), console)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()

    assert "uniform guess" in text
    assert "54.6" in text
    assert "quickstart.md" in text


def _read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_damaged_run_changes_no_other_byte(tmp_path: Path) -> None:
    good = [
        make_trained(system, seed, 4.0 + seed / 10 + (system == "gemma2"))
        for system in ("moxe", "gemma2")
        for seed in (1, 2)
    ]
    damaged = make_trained("xlstm", 1)

    for name, records in (("without", good), ("with", [*good, damaged])):
        run_dirs = write(tmp_path / name, *records)
        if name == "with":
            file = run_dirs[-1] / "train.jsonl"
            file.write_text(file.read_text().replace("6.0", "NaN"))

        write_tables(
            *read_runs(find_run_dirs(tmp_path / name)), tmp_path / name / "tables"
        )

    without, files = (_read_all(tmp_path / n / "tables") for n in ("without", "with"))

    changed = {
        name for name in without.keys() | files.keys() if without[name] != files[name]
    }
    assert changed == {"quickstart.md", "quickstart.json"}

    report = "## Excluded runs\n\n- `{}`: train.jsonl, line 1: a value is NaN.\n\n"
    page = files["quickstart.md"].decode()
    assert page.replace(report.format(damaged.name), "") == (
        without["quickstart.md"].decode()
    )

    content = json.loads(files["quickstart.json"])
    assert [run["name"] for run in content["excluded"]] == [damaged.name]
    assert {**content, "excluded": []} == json.loads(without["quickstart.json"])


def _set_version(text: str) -> str:
    return text.replace('"schema_version": 1', '"schema_version": 2')


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("eval_pretrained.json", lambda t: t[:-30], "eval_pretrained.json: not valid"),
        ("valid.jsonl", lambda t: t.replace("4.0", "NaN"), "a value is NaN"),
        ("environment.json", _set_version, "`schema_version` must be 1, but is 2"),
        (
            "items_moxe_lambada.csv",
            lambda t: t[:-3],
            "items_moxe_lambada.csv: the last",
        ),
        ("items_moxe_lambada.csv", lambda t: t.replace(",-", ",x"), "is not a finite"),
        ("model.json", lambda _: "", "model.json: not valid JSON"),
    ],
    ids=["truncated", "nan", "version", "truncated items", "items", "empty"],
)
def test_damaged_file_is_named_and_changes_no_other_number(
    name: str, damage: Callable[[str], str], reason: str, tmp_path: Path
) -> None:
    nll = np.array([1.0, 2.0, 4.0])
    good = [
        make_scored(system, seed, nll + seed / 9 + (system == "moxe"))
        for system in ("moxe", "gemma2")
        for seed in (1, 2)
    ]
    bad_dir = write(tmp_path, *good, make_scored("xlstm", 1, nll))[-1]
    # Somebody's own files are no run.
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.png").write_bytes(b"\x89PNG")

    file = bad_dir / name
    file.write_text(damage(file.read_text()))

    (suite,) = compare(*read_runs(find_run_dirs(tmp_path)))
    (alone,) = compare(*read_runs([d for d in find_run_dirs(tmp_path) if d != bad_dir]))

    assert [run.name for run in suite.excluded] == ["holiday", bad_dir.name]
    assert reason in suite.excluded[1].reason
    assert f"- `{bad_dir.name}`: {suite.excluded[1].reason}" in suite_markdown(suite)

    assert suite_frame(suite).equals(suite_frame(alone))
    assert pairs_frame(suite).equals(pairs_frame(alone))
    assert suite_latex(suite) == suite_latex(alone)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": [{"Stage": "pretrain", "NLL Loss": "low"}]}, "`NLL Loss` must be a"),
        ({"evals": {"pretrained": {"results": []}}}, "per word` cannot be read"),
        ({"evals": {"instructions": {"pretrained": {"nll_nats": "low"}}}}, "cannot be"),
    ],
    ids=["text in metrics", "foreign results", "text in results"],
)
def test_record_of_another_form_is_named_and_left_out(
    changes: dict[str, Any], reason: str
) -> None:
    good = make_trained("gemma2")
    (alone,) = compare([good], [])
    (suite,) = compare([replace(make_trained("moxe"), **changes), good], [])

    (excluded,) = suite.excluded

    assert excluded.name == "moxe_embedded_cpu2_20261123_s2"
    assert reason in excluded.reason
    assert suite_frame(suite).equals(suite_frame(alone))


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        (
            {"code": Code(version="0.1.0", commit="fedcba", dirty=False)},
            "mixed code: 0.1.0 (0123abc), 0.1.0 (fedcba)",
        ),
        (
            {"code": Code(version="0.1.0", commit="0123abc", dirty=True)},
            "code with uncommitted changes",
        ),
        ({"versions": {"torch": "2.10"}}, "mixed versions of packages"),
        (
            {"hardware": replace(make_trained().environment.hardware, num_jobs=2)},
            "mixed machines",
        ),
    ],
    ids=["code", "dirty", "versions", "machines"],
)
def test_row_of_unlike_runs_is_marked(changes: dict[str, Any], mark: str) -> None:
    records = [make_trained(seed=2), make_trained(seed=3, **changes)]
    (suite,) = compare(records, [])

    (row,) = suite.comparisons[0].rows

    assert row.marks == [mark]
    assert f"| Moxe [{mark}]" in suite_markdown(suite)
    assert list(suite_frame(suite)["marks"]) == [mark]


def test_rows_of_different_code_are_marked_with_it() -> None:
    other = Code(version="0.1.0", commit="fedcba", dirty=False)
    cells = _cells(make_trained("moxe"), make_trained("gemma2", loss=5.0, code=other))

    assert list(cells.index) == [
        "Moxe [code 0.1.0 (0123abc)]",
        "Gemma2 [code 0.1.0 (fedcba)]",
    ]


def test_items_that_contradict_the_results_mark_the_row() -> None:
    nll = np.array([1.0, 2.0, 3.0])
    record = make_scored("moxe", 1, nll)
    other = replace(record, items={LAMBADA: make_lambada(nll + 1.0)})

    assert list(_cells(record).index) == ["Moxe"]
    assert list(_cells(other).index) == ["Moxe [items disagree with results]"]


def test_interval_over_items_stands_beside_the_deviation_over_seeds() -> None:
    # Every item is the same: an interval over items has no width, seeds differ.
    records = [
        make_scored("moxe", 1, np.full(9, 1.0)),
        make_scored("moxe", 2, np.full(9, 2.0)),
    ]
    comparison = _compare(*records)
    column = COLUMNS_BY_KEY["lambada_perplexity_per_word"]

    cells = comparison_cells(comparison, [column], with_intervals=True)

    # exp(1) = 2.718 and exp(2) = 7.389: mean 5.054, deviation 3.303
    assert cells.loc[0, "LAMBADA perplexity per word"] == "5 ± 3 [5, 5]"
    assert comparison.rows[0].statistics[column.key].num_items == 9


def test_seeds_with_other_items_give_a_note_and_no_interval() -> None:
    nll = np.array([1.0, 2.0, 3.0])
    records = [
        make_scored("moxe", 1, nll),
        replace(
            make_scored("moxe", 2, nll), items={LAMBADA: make_lambada(nll, first=1)}
        ),
    ]
    comparison = _compare(*records)

    statistic = comparison.rows[0].statistics["lambada_perplexity_per_word"]

    assert statistic.mean == pytest.approx(math.exp(2.0))
    assert statistic.low is None
    assert any(
        note.startswith("Moxe: No interval over items: ") and "2 in common" in note
        for note in comparison.notes
    )


def test_command_writes_tables_and_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, make_trained())
    paper = Path(__file__).parents[2] / "results" / "paper.json"
    (tmp_path / "paper.json").write_bytes(paper.read_bytes())

    assert main(["--results", str(tmp_path)]) == 0

    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert {
        f"quickstart{part}.{suffix}"
        for part in ("", "_pairs", "_table1")
        for suffix in ("csv", "json", "md", "tex")
    } | {
        f"quickstart_{figure}.{suffix}"
        for figure in ("fig3a", "fig3b", "fig4", "cost")
        for suffix in ("png", "svg")
    } == names - {"paper.md"}
    page = (tmp_path / "tables" / "paper.md").read_text()
    assert "| Full MoxE" in page
    assert "65,213.61" in page
    assert "339,811,690" in page
    assert "Moxe" in capsys.readouterr().out


def test_command_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, make_trained())

    assert main(["--results", str(tmp_path), "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    (suite,) = document["suites"]

    assert document["tables_dir"] == str(tmp_path / "tables")
    assert suite["suite"] == "quickstart"
    assert suite["excluded"] == []

    written = json.loads((tmp_path / "tables" / "quickstart.json").read_text())
    assert suite == written


def test_command_without_a_readable_run_names_the_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()

    assert main(["--results", str(tmp_path)]) == 2

    error = capsys.readouterr().err
    assert "broken: environment.json is missing." in error
    assert "there is no readable run" in error


def test_command_without_a_directory_fails(tmp_path: Path) -> None:
    assert main(["--results", str(tmp_path / "nowhere")]) == 2
