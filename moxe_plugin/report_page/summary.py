"""What a comparison says, in sentences made of its statistics alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moxe_plugin.report.ablations import FULL_SYSTEM, find_pair
from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.columns import LAMBADA_PERPLEXITY
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.content import ComparisonReport
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.pairs import MetricPairs, Pair
from moxe_plugin.report.paper import Paper, format_paper_cell
from moxe_plugin.report.rows import Row
from moxe_plugin.report_page.wording import (
    beats_all,
    describe_cost,
    format_difference,
    name_leader,
)

_BASELINES: Final = ("xlstm", "gemma2", "qwen_moe")

_PAPER_FIGURES: Final = {
    "valid_loss_nats": "3b",
    "fineweb_edu_256_bits_per_byte": "3b",
    LAMBADA_PERPLEXITY: "4",
}
"""Which figure of the paper is about a metric."""


@dataclass(frozen=True, kw_only=True)
class MetricSummary:
    """What is known of a metric, as answers to a reader's questions."""

    heading: str
    direction: str
    leader: str
    value: str
    answers: Sequence[tuple[str, Sequence[str]]]
    """Questions, each with lines that answer it."""


def summarize_headline(comparison: Comparison) -> list[str]:
    """Say who is best, and whether that is shown.

    :param comparison: The comparison.

    :returns: Sentences.
    """
    metrics = comparison.pairs
    if not metrics:
        return ["There are no two systems with the same number to compare."]

    counts = Counter(name_leader(metric) for metric in metrics)
    total = f"{len(metrics)} metric{'s' * (len(metrics) > 1)}"
    leaders = ", ".join(f"{name} on {count}" for name, count in counts.most_common())
    sentences = [f"Best mean among the trained systems, of {total}: {leaders}."]

    lost = [metric.column.heading for metric in metrics if beats_all(metric)]
    if lost:
        sentences.append(
            "The best guess, which has learnt from counts at most, has a better number "
            f"than every trained system on: {'; '.join(lost)}."
        )

    if not any(pair.estimate for metric in metrics for pair in metric.pairs):
        return [
            *sentences,
            "No difference could be tested (fewer than two seeds in common, or no "
            "items to pair): the order of the systems may be chance.",
        ]

    alone = [metric for metric in metrics if not metric.not_beaten]
    if alone:
        names = "; ".join(
            f"{m.column.heading} ({m.leader.marked_label})" for m in alone
        )
        sentences.append(f"Shown to be better than every other system: {names}.")

    open_metrics = [m.column.heading for m in metrics if m.not_beaten]
    if open_metrics:
        sentences.append(
            "The best mean is not shown to be better than every other system on: "
            f"{'; '.join(open_metrics)}."
        )

    return sentences


def summarize_metric(
    metric: MetricPairs, report: ComparisonReport, paper: Paper | None
) -> MetricSummary:
    """Answer who is best by a metric, by how much, how sure, and at which cost.

    :param metric: The metric.
    :param report: The comparison that it is of.
    :param paper: The paper's numbers.

    :returns: The answers.
    """
    column, leader = metric.column, metric.leader

    pairs = [pair for pair in metric.pairs if pair.first is leader]
    parts: dict[str, list[Pair]] = {
        "Shown to be worse": [p for p in pairs if p.verdict == "better"],
        "Not decided": [p for p in pairs if p.estimate and p.verdict == "not decided"],
        # Means are over all seeds, tests over those in common.
        "Shown to be better": [p for p in pairs if p.verdict == "worse"],
    }
    answers: list[tuple[str, Sequence[str]]] = [
        (f"{name} ({len(found)} of {len(pairs)})", _list_pairs(column, found))
        for name, found in parts.items()
        if found
    ]

    untested = [pair for pair in pairs if pair.estimate is None]
    if untested:
        answers.append(
            (
                f"Not tested ({len(untested)} of {len(pairs)})",
                _explain(column, untested),
            )
        )

    answers.append(("Against the best guess", _describe_guess(metric)))

    if baselines := _compare_baselines(column, report.comparison):
        answers.append(("MoxE less each baseline", baselines))

    answers.append(("In the paper", _quote_paper(column, leader, paper)))

    return MetricSummary(
        heading=column.heading,
        direction="lower is better" if column.lower_is_better else "higher is better",
        leader=name_leader(metric),
        value=_describe_value(column, leader),
        answers=answers,
    )


def summarize_costs(report: ComparisonReport) -> list[tuple[str, str]]:
    """Say what the leaders and the full MoxE cost.

    :param report: The comparison.

    :returns: Systems in the order of rows, each with its cost.
    """
    leaders = [metric.leader for metric in report.comparison.pairs]

    return [
        (row.marked_label, describe_cost(report, row))
        for row in report.comparison.trained_rows
        if row.system == FULL_SYSTEM or any(row is leader for leader in leaders)
    ]


def _list_pairs(column: Column, pairs: Sequence[Pair]) -> list[str]:
    return [
        f"{pair.second.marked_label}: {format_difference(column, pair, sign=-1)}"
        for pair in pairs
    ]


def _explain(column: Column, pairs: Sequence[Pair]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for pair in pairs:
        name = f"{pair.second.marked_label} ({format_cell(column, pair.second)})"
        by_reason.setdefault(pair.reason or "", []).append(name)

    return [f"{'; '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _describe_value(column: Column, row: Row) -> str:
    statistic = row.statistics[column.key]
    runs = f"{statistic.num_runs} seed{'s' * (statistic.num_runs > 1)}"

    return f"{format_cell(column, row, with_interval=True)} ({runs})"


def _describe_guess(metric: MetricPairs) -> list[str]:
    column = metric.column
    pairs = [pair for pair in metric.guess_pairs if pair.first is metric.leader]

    if not pairs:
        return ["No guess has this number."]

    (pair,) = pairs
    name = f"{pair.second.marked_label} ({format_cell(column, pair.second)})"
    if beats_all(metric):
        name += ", a better number than that of every trained system"

    if pair.estimate is None:
        return [f"{name}: not tested, {pair.reason}"]

    words = {
        "better": "beaten",
        "worse": "not beaten: it is shown to be better",
        "not decided": "not shown to be beaten",
    }
    lost = [
        p.first.marked_label
        for p in metric.guess_pairs
        if p.verdict != "better" and p.first is not metric.leader
    ]
    lines = [
        f"{name}: {words[pair.verdict]}; {format_difference(column, pair, sign=-1)}"
    ]
    if lost:
        lines.append(f"Systems not shown to beat it: {'; '.join(lost)}.")

    return lines


def _compare_baselines(column: Column, comparison: Comparison) -> list[str]:
    full = next((r for r in comparison.trained_rows if r.system == FULL_SYSTEM), None)
    if full is None:
        return []

    lines = []

    for row in comparison.trained_rows:
        if row.system not in _BASELINES:
            continue

        pair = find_pair(comparison, column.key, full, row)
        if pair is None or pair.estimate is None:
            continue

        sign = 1 if pair.first is full else -1
        verdict = {"better": 1, "worse": -1, "not decided": 0}[pair.verdict] * sign
        word = {1: "better", -1: "worse", 0: "not decided"}[verdict]

        lines.append(
            f"{row.marked_label}: MoxE is {word}; "
            f"{format_difference(column, pair, sign=sign)}"
            if verdict
            else f"{row.marked_label}: {word}; "
            f"{format_difference(column, pair, sign=sign)}"
        )

    return lines


def _quote_paper(column: Column, leader: Row, paper: Paper | None) -> list[str]:
    lines = []

    name = _PAPER_FIGURES.get(column.key)
    figure = paper.figure(name) if paper and name else None
    if figure is not None:
        lines.append(f"Figure {figure.figure}, {figure.subject}: {figure.says}")

    table = paper.table("table2") if paper else None
    if table is not None and column.key == LAMBADA_PERPLEXITY:
        systems = zip(table.rows, table.systems, strict=True)
        lines += [
            f"Table 2, {row[0]}: {format_paper_cell(row[1])} (one seed; whether per "
            "token or per word the paper does not say)"
            for row, names in systems
            if FULL_SYSTEM in names or leader.system in names
        ]

    return lines or ["The paper gives no number for this."]
