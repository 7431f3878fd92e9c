"""The paper's numbers, and ours beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moxe_plugin.report.ablations import ablation_table
from moxe_plugin.report.architecture_tables import (
    architecture_table,
    suite_architecture_table,
)
from moxe_plugin.report.architectures import read_architectures
from moxe_plugin.report.comparison import Comparison, compare
from moxe_plugin.report.files import DamagedRecordError
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.paper import paper_markdown, read_paper
from moxe_plugin.report.records import RunRecord
from tests.report.synthetic import make_guess, make_trained
from tests.report.synthetic_items import make_scored

RESULTS = Path(__file__).parents[2] / "results"
PAPER = read_paper(RESULTS / "paper.json")


def _compare(*records: RunRecord) -> Comparison:
    (suite,) = compare(records, [])
    (comparison,) = suite.comparisons

    return comparison


def _ablations(*records: RunRecord) -> Table | None:
    return ablation_table("small_table2", "Caption.", _compare(*records), PAPER)


def test_papers_changes_follow_from_its_perplexities() -> None:
    table = PAPER.table("table2")
    assert table is not None

    full, *others = table.rows

    for _, perplexity, change in others:
        assert isinstance(perplexity, float)
        assert isinstance(full[1], float)
        share = perplexity / full[1] - 1.0
        printed = float(str(change).removesuffix(" %"))
        # The paper's own arithmetic: one change is off in the second decimal.
        assert 100 * share == pytest.approx(printed, abs=0.03)


def test_page_of_the_paper_tells_of_its_figures() -> None:
    page = paper_markdown(PAPER)

    assert "| Full MoxE" in page
    assert "65,213.61" in page
    assert "**Figure 8**" in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"source": "a"}, "not in the known form"),
        ({"source": "a", "tables": [{"key": "a"}], "figures": []}, "not in the known"),
        (
            {
                "source": "a",
                "tables": [
                    {
                        "key": "table1",
                        "title": "a",
                        "note": "a",
                        "columns": ["a", "b"],
                        "rows": [[1]],
                        "systems": [[]],
                    }
                ],
                "figures": [],
            },
            "must have 2 cells",
        ),
    ],
    ids=["lacking", "unknown", "short row"],
)
def test_paper_file_of_another_form_is_refused(
    content: dict[str, object], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "paper.json"
    file.write_text(json.dumps(content))

    with pytest.raises(DamagedRecordError, match=reason):
        read_paper(file)


def test_our_architectures_stand_beside_the_papers() -> None:
    architectures, damaged = read_architectures(RESULTS / "tables")
    table = architecture_table(architectures, PAPER)

    assert damaged == []
    assert table is not None

    cells = table.cells.set_index(["model", "experts remember"])
    ours = cells.loc["MoxE", "subsequence"]

    assert cells.loc["xLSTM[5:1]", "—"]["layers"] == "36"
    assert (ours["parameters, paper"], ours["total"]) == ("340M", "339,811,690")
    assert ours["MFLOP per token"] == "300.0"

    # What `moxe systems` prints of the paper is what the paper prints.
    printed = table.numbers["parameters, paper"]
    assert (printed == table.numbers["paper_parameters"]).all()


def test_damaged_table_of_systems_is_named(tmp_path: Path) -> None:
    text = (RESULTS / "tables" / "systems_340m.csv").read_text()
    (tmp_path / "systems_good.csv").write_text(text)
    (tmp_path / "systems_other.csv").write_text("label,arch\na,b\n")
    (tmp_path / "systems_text.csv").write_text(text.replace("339811690", "many"))
    (tmp_path / "systems_void.csv").write_text("")

    architectures, damaged = read_architectures(tmp_path)

    assert {a.size for a in architectures} == {"good"}
    assert [file.name for file in damaged] == [
        "systems_other.csv",
        "systems_text.csv",
        "systems_void.csv",
    ]


def test_architectures_of_a_suite_have_cost_where_it_is_known() -> None:
    architectures, _ = read_architectures(RESULTS / "tables")
    unknown = make_trained("unheard_of", loss=5.0)

    table = suite_architecture_table(
        "a_table1", "Caption.", _compare(make_trained("moxe"), unknown), architectures
    )

    moxe, other = table.cells.to_dict("records")
    # The run's own count goes before that of `moxe systems`.
    assert moxe["total"] == "1,900,000"
    assert moxe["MFLOP per token"] == "1.9"
    assert other["MFLOP per token"] == "—"
    assert "unheard_of quickstart" in table.notes[-1]


def test_ablations_have_their_change_beside_the_papers() -> None:
    nll = np.random.default_rng(0).normal(5.0, 1.0, size=300)
    records = [
        make_scored(system, seed, nll + factor * (math.log(2.0) + seed / 1000))
        for system, factor in (("moxe", 0.0), ("moxe_mlstm", 1.0))
        for seed in (1, 2, 3)
    ]

    table = _ablations(*records, make_guess())
    assert table is not None

    cells = table.cells.set_index("ours")

    assert cells.loc["Moxe", "change"] == "—"
    assert cells.loc["Moxe", "paper's perplexity"] == "65,213.61"
    # Twice the perplexity, and two thousandths of a nat
    assert cells.loc["Moxe_mlstm", "change"] == "+100.4%"
    assert cells.loc["Moxe_mlstm", "paper's change"] == "+31.82 %"
    # The paper's other rows keep their place.
    assert len(table.cells) == 6

    numbers = table.numbers.set_index("system").loc["moxe_mlstm"]
    assert numbers["change_value"] == pytest.approx(2 * math.exp(0.002) - 1)
    assert numbers["change_low"] < numbers["change_value"] < numbers["change_high"]


def test_ablations_without_lambada_say_what_they_are_compared_by() -> None:
    records = [
        make_trained(system, seed, loss + seed / 100)
        for system, loss in (("moxe", 4.0), ("moxe_gamma0", 4.5))
        for seed in (1, 2)
    ]

    table = _ablations(*records)
    assert table is not None

    assert "perplexity per token" in table.cells
    assert "LAMBADA was not measured here" in table.notes[0]
    # Half a nat is a factor of 1.649.
    assert table.cells.set_index("ours").loc["Moxe_gamma0", "change"] == "+64.9%"


def test_no_ablation_makes_no_table() -> None:
    assert _ablations(make_trained("moxe"), make_trained("gemma2")) is None
    assert _ablations(make_trained("moxe_gamma0"), make_trained("moxe_ffn")) is None
