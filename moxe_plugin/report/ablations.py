"""Table 2 as the paper shows it: our ablations beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.columns import COLUMNS_BY_KEY, LAMBADA_PERPLEXITY
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.pairs import LEVEL, Pair
from moxe_plugin.report.paper import Cell, Paper, format_paper_cell
from moxe_plugin.report.rows import Row

FULL_SYSTEM: Final = "moxe"
"""What Table 2's ablations are compared with."""

_STAND_IN: Final = "valid_loss_nats"
"""What Table 2 compares where LAMBADA was not measured."""


def ablation_table(
    name: str, caption: str, comparison: Comparison, paper: Paper | None
) -> Table | None:
    """Set our ablations beside the paper's Table 2.

    :param name: The stem of its files.
    :param caption: Data, seeds and size.
    :param comparison: The rows.
    :param paper: The paper's numbers.

    :returns: The table; ``None`` without the full model and an ablation, or without
        the paper's table.
    """
    published = paper.table("table2") if paper else None
    key = ablation_metric(comparison)

    if published is None or key is None:
        return None

    cells, numbers = [], []
    no_rows: list[Row | None] = [None]

    for paper_row, systems in zip(published.rows, published.systems, strict=True):
        rows: list[Row | None] = [
            row
            for row in comparison.trained_rows
            if row.system in systems and key in row.statistics
        ]

        for row in rows or no_rows:
            change = None if row is None else _find_change(comparison, key, row)
            cells.append(_ablation_cells(key, paper_row, row, change))
            numbers.append(_ablation_numbers(key, paper_row, row, change))

    if sum(line["system"] is not None for line in numbers) < 2:
        return None

    return Table(
        name=name,
        title=f"{name}: ablations, as in the paper's Table 2",
        caption=caption,
        cells=pd.DataFrame(cells, dtype="object"),
        numbers=pd.DataFrame(numbers),
        notes=_ablation_notes(key, published.note),
        num_names=2,
    )


def ablation_metric(comparison: Comparison) -> str | None:
    """Choose what ablations are compared by.

    :param comparison: The rows.

    :returns: The key of LAMBADA's perplexity per word, or that of the held-out loss
        where LAMBADA was not measured; ``None`` without the full model.
    """
    for key in (LAMBADA_PERPLEXITY, _STAND_IN):
        if any(
            row.system == FULL_SYSTEM and key in row.statistics
            for row in comparison.trained_rows
        ):
            return key

    return None


def find_pair(comparison: Comparison, key: str, row: Row, other: Row) -> Pair | None:
    """Find the test of two rows by a metric.

    :param comparison: The comparison.
    :param key: The metric's column.
    :param row: A row.
    :param other: Another one.

    :returns: The pair, in either order; ``None`` if there is none.
    """
    for metric in comparison.pairs:
        if metric.column.key != key:
            continue

        for pair in metric.pairs:
            if {id(pair.first), id(pair.second)} == {id(row), id(other)}:
                return pair

    return None


@dataclass(frozen=True, kw_only=True)
class _Change:
    """How much larger the perplexity is than that of the full model."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    adjusted_p_value: float | None = None


def _find_change(comparison: Comparison, key: str, row: Row) -> _Change | None:
    full = next(r for r in comparison.trained_rows if r.system == FULL_SYSTEM)

    if row.system == FULL_SYSTEM:
        return None

    pair = find_pair(comparison, key, row, full)
    if pair is None or pair.estimate is None:
        return None

    low, value, high = pair.estimate.low, pair.estimate.value, pair.estimate.high
    if pair.first is full:
        low, value, high = -high, -value, -low

    return _Change(
        value=math.expm1(value),
        low=math.expm1(low),
        high=math.expm1(high),
        adjusted_p_value=pair.adjusted_p_value,
    )


def _ablation_cells(
    key: str, paper_row: Sequence[Cell], row: Row | None, change: _Change | None
) -> dict[str, str]:
    shown = "valid_perplexity_per_token" if key == _STAND_IN else key
    column = COLUMNS_BY_KEY[shown]

    def share(number: float | None) -> str:
        return DASH if number is None else f"{number:+.1%}"

    cells = {
        "configuration": str(paper_row[0]),
        "ours": DASH if row is None else row.marked_label,
        "seeds": DASH if row is None else ", ".join(map(str, row.seeds)),
        column.heading: (
            DASH if row is None else format_cell(column, row, with_interval=True)
        ),
    }

    if change is None:
        cells |= dict.fromkeys(("change", "95 % interval", "p, Holm"), DASH)
    else:
        cells |= {
            "change": share(change.value),
            "95 % interval": f"[{share(change.low)}, {share(change.high)}]",
            "p, Holm": format(change.adjusted_p_value, ".2g"),
        }

    return {
        **cells,
        "paper's perplexity": format_paper_cell(paper_row[1]),
        "paper's change": format_paper_cell(paper_row[2]),
    }


def _ablation_numbers(
    key: str, paper_row: Sequence[Cell], row: Row | None, change: _Change | None
) -> dict[str, Any]:
    statistic = None if row is None else row.statistics[key]

    return {
        "configuration": paper_row[0],
        "system": None if row is None else row.system,
        "metric": key,
        "mean": None if statistic is None else statistic.mean,
        "sd": None if statistic is None else statistic.sd,
        **{f"change_{k}": v for k, v in (change or _Change()).__dict__.items()},
        "paper_perplexity": paper_row[1],
        "paper_change": paper_row[2],
        "runs": None if row is None else " ".join(row.run_names),
    }


def _ablation_notes(key: str, paper_note: str) -> list[str]:
    notes = [
        "The change is that of the geometric mean over seeds, from pairs of equal "
        "items and seeds; its interval and p-value are those of the page of pairs "
        f"(Holm's method over all pairs of the table; below {LEVEL} is decided).",
        f"The paper's are of one seed, other data and another size. {paper_note}",
    ]

    if key == _STAND_IN:
        notes.insert(
            0,
            "LAMBADA was not measured here: our numbers are perplexities per token on "
            "held-out text of the training data, the paper's are of LAMBADA.",
        )

    return notes
