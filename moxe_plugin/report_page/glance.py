"""Each metric in a line: who is best, by how much, how sure, at which cost."""

from __future__ import annotations

import pandas as pd

from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.columns import COLUMNS_BY_KEY
from moxe_plugin.report.content import ComparisonReport
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.pairs import MetricPairs
from moxe_plugin.report_page.wording import (
    beats_all,
    find_flops,
    find_ties,
    format_difference,
    name_leader,
)


def glance_cells(report: ComparisonReport) -> pd.DataFrame:
    """Format the answers in a line a metric.

    :param report: The comparison.

    :returns: Text cells.
    """
    frame: pd.DataFrame = pd.DataFrame(
        [_glance(metric, report) for metric in report.comparison.pairs], dtype="object"
    )

    return frame


def _glance(metric: MetricPairs, report: ComparisonReport) -> dict[str, str]:
    column, leader = metric.column, metric.leader

    pairs = [pair for pair in metric.pairs if pair.first is leader]
    num_beaten = sum(pair.verdict == "better" for pair in pairs)
    following = pairs[0].second
    tested = [pair for pair in pairs if pair.estimate is not None]
    guesses = [pair for pair in metric.guess_pairs if pair.first is leader]

    # Of systems that are tied, none's cost is that of the best.
    is_tied = len(find_ties(metric)) > 1
    flops = None if is_tied else find_flops(report, leader)

    words = {"better": "yes", "worse": "no", "not decided": "not decided"}
    speed = COLUMNS_BY_KEY["throughput_tokens_per_s"]

    return {
        "metric": f"{column.heading} {'↓' if column.lower_is_better else '↑'}",
        "best mean": name_leader(metric),
        "value": format_cell(column, leader),
        "next": f"{following.marked_label}, {format_cell(column, following)}",
        "next less best": (
            format_difference(column, pairs[0], sign=-1)
            if pairs[0].estimate is not None
            else "not tested"
        ),
        "shown to be worse": (
            f"{num_beaten} of {len(pairs)} others" if tested else "not tested"
        ),
        "beats the best guess": (
            words[guesses[0].verdict]
            if guesses and guesses[0].estimate is not None
            else "not tested" + "; the guess has a better number" * beats_all(metric)
        ),
        "its MFLOP per token": DASH if flops is None else f"{flops / 1e6:,.1f}",
        "its tokens/s": DASH if is_tied else format_cell(speed, leader),
    }
