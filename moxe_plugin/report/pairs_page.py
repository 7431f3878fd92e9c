"""The page of pairs of a suite: who is better than whom, by how much, how sure."""

from __future__ import annotations

import math
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.comparison import Comparison, SuiteResults
from moxe_plugin.report.formats import DASH, latex_table, markdown_table
from moxe_plugin.report.pairs import LEVEL, MetricPairs, Pair
from moxe_plugin.report.suite_page import describe_setting

_PREAMBLE: Final = f"""\
Written by `moxe tables`. Each system is compared with each other on the same items and
the same seeds. `difference` is the first less the second, with its 95 % interval: the
variance over seeds and that over 2000 bootstrap resamples of items (paired: the same
resamples for both) added, with Student's t and Satterthwaite's degrees of freedom.
Metrics without items, such as the loss on held-out tokens, have seeds only: a paired t
test. `p, Holm` is the p-value adjusted by Holm's method for all pairs of the metric in
its table. The first is *better* (or *worse*) only if that is below {LEVEL} and the
interval excludes 0; all else is *not decided*, which is not the same as equal.
Differences of perplexities are of their logarithms, and `ratio` is what they come to:
0.9 is a perplexity lower by a tenth."""

_LEADERS: Final = "### Which system is best on what"


def pairs_markdown(results: SuiteResults) -> str:
    """Write the page of pairs.

    :param results: The suite.

    :returns: Markdown.
    """
    parts = [f"# {results.suite}: pairs of systems", _PREAMBLE]

    for comparison in results.comparisons:
        parts.append(f"## {describe_setting(comparison)}")

        if not comparison.pairs:
            parts.append("There are no two systems with the same number to compare.")
            continue

        parts += [_LEADERS, markdown_table(leader_cells(comparison), num_names=2)]

        for metric in comparison.pairs:
            parts += _metric_parts(metric)

    return "\n\n".join(parts) + "\n"


def pairs_latex(results: SuiteResults) -> str:
    """Write the tables of pairs.

    :param results: The suite.

    :returns: LaTeX, one ``table`` a metric; needs ``booktabs``.
    """
    parts = ["% Written by `moxe tables`; needs \\usepackage{booktabs}."]

    for number, comparison in enumerate(results.comparisons, start=1):
        for metric in comparison.pairs:
            caption = (
                f"{results.suite}: {metric.column.heading}, pairs of systems. "
                f"{describe_setting(comparison)} p-values adjusted by Holm's method "
                f"over the {len(metric.pairs)} pairs."
            )
            label = f"tab:{results.suite}-{number}-pairs-{metric.column.key}"
            parts.append(
                latex_table(
                    pair_cells(metric), caption=caption, label=label, num_names=2
                )
            )

    return "\n".join(parts)


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


def pair_cells(metric: MetricPairs) -> pd.DataFrame:
    """Format the pairs of a metric.

    :param metric: The pairs.

    :returns: Text cells, one row a pair.
    """
    frame: pd.DataFrame = pd.DataFrame(
        [_format_pair(metric, pair) for pair in metric.pairs], dtype="object"
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
        for pair in metric.pairs
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
                    }
                    for metric in comparison.pairs
                ],
            }
            for comparison in results.comparisons
        ],
    }


def _metric_parts(metric: MetricPairs) -> list[str]:
    parts = [f"### {metric.column.heading}", _describe_basis(metric)]

    if any(pair.estimate is not None for pair in metric.pairs):
        parts.append(markdown_table(pair_cells(metric), num_names=2))

    if metric.notes:
        parts.append("\n".join(f"- Note: {note}" for note in metric.notes))

    return parts


def _describe_basis(metric: MetricPairs) -> str:
    num_tested = sum(pair.estimate is not None for pair in metric.pairs)
    better = "lower" if metric.column.lower_is_better else "higher"
    bases = sorted({pair.basis for pair in metric.pairs if pair.basis})
    items = sorted({pair.num_items for pair in metric.pairs if pair.num_items})

    text = f"In {metric.column.unit}; {better} is better. "
    text += f"{num_tested} of {len(metric.pairs)} pairs tested"

    if bases:
        text += f", over {' or '.join(bases)}"
    if items:
        text += f" ({', '.join(f'{count:,}' for count in items)} items)"

    return text + "; Holm's method over these."


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
