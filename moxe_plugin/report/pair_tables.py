"""Pairs of systems as text cells, and as unrounded numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.comparison import Comparison, SuiteResults
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.pairs import LEVEL, MetricPairs, Pair
from moxe_plugin.report.suite_page import describe_setting


def leader_cells(comparison: Comparison) -> pd.DataFrame:
    """Format which system is best by each metric.

    :param comparison: The comparison.

    :returns: Text cells, one row a metric.
    """
    rows = []

    for metric in comparison.pairs:
        rivals = "; ".join(row.label for row in metric.not_beaten)

        rows.append(
            {
                "metric": metric.column.heading,
                "best mean": metric.leader.marked_label,
                "value": format_cell(metric.column, metric.leader),
                "not shown to be worse": rivals or "none: better than all others",
            }
        )

    frame: pd.DataFrame = pd.DataFrame(rows, dtype="object")

    return frame


def pair_cells(metric: MetricPairs, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Format pairs of a metric.

    :param metric: The metric.
    :param pairs: Its pairs of systems, or those of systems and a guess.

    :returns: Text cells, one row a pair.
    """
    frame: pd.DataFrame = pd.DataFrame(
        [_format_pair(metric, pair) for pair in pairs], dtype="object"
    )

    return frame


def pairs_frame(results: SuiteResults) -> pd.DataFrame:
    """List all pairs of a suite with unrounded numbers.

    :param results: The suite.

    :returns: One line a pair and metric.
    """
    lines = [
        {"comparison": number, "metric": metric.column.key, **pair_content(pair)}
        for number, comparison in enumerate(results.comparisons, start=1)
        for metric in comparison.pairs
        for pair in (*metric.pairs, *metric.guess_pairs)
    ]

    frame: pd.DataFrame = pd.DataFrame(
        lines, columns=["comparison", "metric", *_KEYS]
    ).astype({"num_items": "Int64"})

    return frame


_KEYS: Final = (
    "first",
    "second",
    "first_label",
    "second_label",
    "difference",
    "low",
    "high",
    "p_value",
    "adjusted_p_value",
    "verdict",
    "basis",
    "seeds",
    "num_items",
    "reason",
)


def pair_content(pair: Pair) -> dict[str, Any]:
    """List what is known of a pair as plain values.

    :param pair: The pair.

    :returns: Values by name; ``None`` for what does not exist.
    """
    estimate = pair.estimate

    values = (
        pair.first.system,
        pair.second.system,
        pair.first.marked_label,
        pair.second.marked_label,
        None if estimate is None else estimate.value,
        None if estimate is None else estimate.low,
        None if estimate is None else estimate.high,
        pair.p_value,
        pair.adjusted_p_value,
        pair.verdict,
        pair.basis,
        " ".join(map(str, pair.seeds)),
        pair.num_items,
        pair.reason,
    )

    return dict(zip(_KEYS, values, strict=True))


def pairs_content(results: SuiteResults) -> dict[str, Any]:
    """List all pairs of a suite as plain values.

    :param results: The suite.

    :returns: The content of its JSON file.
    """
    return {
        "suite": results.suite,
        "correction": "Holm, over the pairs of a metric in a comparison",
        "level": LEVEL,
        "comparisons": [
            {
                "setting": describe_setting(comparison),
                "metrics": [
                    {
                        "metric": metric.column.key,
                        "unit": metric.column.unit,
                        "log_scale": metric.column.log_scale,
                        "leader": metric.leader.system,
                        "not_beaten": [row.system for row in metric.not_beaten],
                        "pairs": [pair_content(pair) for pair in metric.pairs],
                        "guess_pairs": [
                            pair_content(pair) for pair in metric.guess_pairs
                        ],
                    }
                    for metric in comparison.pairs
                ],
            }
            for comparison in results.comparisons
        ],
    }


def _format_pair(metric: MetricPairs, pair: Pair) -> dict[str, str]:
    cells = {"first": pair.first.marked_label, "second": pair.second.marked_label}
    estimate = pair.estimate

    if estimate is None or pair.p_value is None or pair.adjusted_p_value is None:
        ratio = ["ratio"] if metric.column.log_scale else []
        dashes = ["difference", "95 % interval", *ratio, "p", "p, Holm"]

        return {**cells, **dict.fromkeys(dashes, DASH), "first is": "not compared"}

    digits = ".3f" if abs(estimate.value) >= 0.1 else ".4f"

    cells |= {
        "difference": format(estimate.value, f"+{digits}"),
        "95 % interval": f"[{estimate.low:+{digits}}, {estimate.high:+{digits}}]",
    }

    if metric.column.log_scale:
        cells["ratio"] = f"{math.exp(estimate.value):.3g}"

    return {
        **cells,
        "p": f"{pair.p_value:.2g}",
        "p, Holm": f"{pair.adjusted_p_value:.2g}",
        "first is": pair.verdict,
    }
