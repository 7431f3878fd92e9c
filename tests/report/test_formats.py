"""Tables as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from moxe_plugin.report.formats import (
    latex_table,
    markdown_table,
    write_csv,
    write_rounded_json,
)


def test_markdown_aligns_numbers_right_and_escapes_bars() -> None:
    cells = pd.DataFrame({"system": ["a|b"], "loss": ["4.0 ± 0.1"]})

    assert markdown_table(cells).splitlines() == [
        "| system   |      loss |",
        "|:---------|----------:|",
        "| a\\|b     | 4.0 ± 0.1 |",
    ]


def test_latex_has_rules_of_booktabs_and_escapes_what_latex_reads() -> None:
    cells = pd.DataFrame({"system_1": ["a & b [x]"], "share, %": ["4 ± 1"]})

    text = latex_table(cells, caption="50 % of \u03b3_1", label="tab:a")

    assert text.splitlines() == [
        r"\begin{table}",
        r"\caption{50 \% of $\gamma$\_1}",
        r"\label{tab:a}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"system\_1 & share, \% \\",
        r"\midrule",
        r"a \& b {[}x] & 4 $\pm$ 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_csv_leaves_out_what_does_not_exist_and_the_noise_of_the_last_digits(
    tmp_path: Path,
) -> None:
    write_csv(
        pd.DataFrame({"a": [0.1 + 0.2, None], "n": [339811690, 2]}), tmp_path / "a.csv"
    )

    assert (tmp_path / "a.csv").read_bytes() == b"a,n\n0.3,339811690\n,2\n"


def test_json_has_null_for_what_does_not_exist(tmp_path: Path) -> None:
    content = {"a": [0.1 + 0.2, float("nan")], "b": {"n": 339811690, "t": True}}

    write_rounded_json(content, tmp_path / "a.json")

    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": [0.3, None],
        "b": {"n": 339811690, "t": True},
    }


def test_names_are_no_markup_of_markdown() -> None:
    cells = pd.DataFrame(
        {"system": ["<script>alert(1)</script>", "a | b\nc"], "p": ["< 0.05", "1"]}
    )

    lines = markdown_table(cells).splitlines()

    assert len(lines) == 4
    assert "&lt;script>alert(1)&lt;/script>" in lines[2]
    assert "< 0.05" in lines[2]
    assert r"a \| b c" in lines[3]
