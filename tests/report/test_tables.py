"""Tables from run records, cell by cell."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from moxe_plugin.report.__main__ import main
from moxe_plugin.report.comparison import compare
from moxe_plugin.report.records import DamagedRun, RunRecord
from moxe_plugin.report.tables import (
    comparison_cells,
    suite_frame,
    suite_markdown,
    write_tables,
)
from moxe_plugin.report.terminal import print_results
from tests.report.synthetic import DATA, make_guess, make_trained, write


def _cells(*records: RunRecord) -> pd.DataFrame:
    (suite,) = compare(records, [])
    (comparison,) = suite.comparisons

    cells: pd.DataFrame = comparison_cells(comparison).set_index("system")

    return cells


def test_cells_of_one_run() -> None:
    assert _cells(make_trained()).loc["Moxe"].to_dict() == {
        "seeds": "2",
        "parameters": "1,900,000",
        "active": "800,000",
        "training tokens": "40,960",
        "train loss, nats": "3.900",
        "valid loss, nats": "4.000",
        "perplexity per token": "54.6",
        "bits per byte": "2.346",
        "perplexity per word": "1,500",
        "last-word accuracy": "6.2%",
        "instruction loss, nats": "4.500",
        "after finetuning, nats": "3.000",
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
    record = replace(make_trained(), evals={}, valid=[])
    cells = _cells(record, make_guess())

    for heading in ("valid loss, nats", "last-word accuracy", "after finetuning, nats"):
        assert cells.loc["Moxe", heading] == "—"

    for heading in ("parameters", "last-word accuracy", "tokens/s", "wall time, s"):
        assert cells.loc["uniform guess", heading] == "—"

    assert cells.loc["uniform guess", "perplexity per token"] == "2,048.0"


def test_number_that_some_seeds_lack_says_so() -> None:
    complete = make_trained(seed=2)
    cells = _cells(complete, replace(make_trained(seed=3), evals={}))

    assert cells.loc["Moxe", "bits per byte"] == "2.346 (1 of 2)"


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

    assert len(table) == 3
    assert [cell.strip() for cell in table[2].strip("|").split("|")] == (
        ["uniform guess", *["—"] * 5, "7.625", "2,048.0", "3.500", *["—"] * 7]
    )


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

    for name in ("quickstart.md", "quickstart.csv", "quickstart.png"):
        one, two = (tmp_path / d / "tables" / name for d in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def test_terminal_shows_the_rows() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_results(compare([make_trained(), make_guess()], []), Path("tables"), console)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()

    assert "uniform guess" in text
    assert "54.6" in text
    assert "quickstart.md" in text


def test_command_writes_tables_and_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, make_trained())
    paper = Path(__file__).parents[2] / "results" / "paper.json"
    (tmp_path / "paper.json").write_bytes(paper.read_bytes())

    assert main(["--results", str(tmp_path)]) == 0

    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "paper.md",
        "quickstart.csv",
        "quickstart.md",
        "quickstart.png",
    ]
    page = (tmp_path / "tables" / "paper.md").read_text()
    assert "| Full MoxE" in page
    assert "65,213.61" in page
    assert "339,811,690" in page
    assert "Moxe" in capsys.readouterr().out


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
