"""How the page words a difference and a cost."""

from __future__ import annotations

import math
from typing import Final

from moxe_plugin.report.cells import format_cell
from moxe_plugin.report.columns import COLUMNS_BY_KEY
from moxe_plugin.report.content import ComparisonReport
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.pairs import MetricPairs, Pair
from moxe_plugin.report.rows import Row

_COST_UNITS: Final = {
    "parameters": "parameters",
    "active_parameters": "of them active",
    "throughput_tokens_per_s": "tokens/s in training",
    "peak_memory_gib": "GiB peak memory",
    "wall_s": "s in all",
}


def find_flops(report: ComparisonReport, row: Row) -> float | None:
    """Find what a forward pass of a row costs.

    :param report: The comparison.
    :param row: The row.

    :returns: Useful FLOPs per token; ``None`` if `moxe systems` has not counted them.
    """
    table = find_table(report, "table1")
    if table is None:
        return None

    found = table.numbers["runs"] == " ".join(row.run_names)
    flops = table.numbers.loc[found, "flops_per_token"].dropna()

    return float(flops.iloc[0]) if len(flops) else None


def find_ties(metric: MetricPairs) -> list[Row]:
    """Find the systems whose mean equals the best, such as shares that are all 0.

    :param metric: The metric.

    :returns: The rows, the leader first.
    """
    key = metric.column.key
    rows = [
        metric.leader,
        *(p.second for p in metric.pairs if p.first is metric.leader),
    ]
    best = metric.leader.statistics[key].mean

    return [row for row in rows if row.statistics[key].mean == best]


def name_leader(metric: MetricPairs) -> str:
    """Name who has the best mean.

    :param metric: The metric.

    :returns: The label, or how many systems are tied.
    """
    ties = find_ties(metric)

    return metric.leader.marked_label if len(ties) == 1 else f"{len(ties)} systems tied"


def beats_all(metric: MetricPairs) -> bool:
    """Tell whether the best guess has a better number than every trained system.

    :param metric: The metric.

    :returns: Whether; this is no test.
    """
    key = metric.column.key
    sign = 1.0 if metric.column.lower_is_better else -1.0
    best = sign * metric.leader.statistics[key].mean

    return any(sign * p.second.statistics[key].mean < best for p in metric.guess_pairs)


def find_table(report: ComparisonReport, name: str) -> Table | None:
    """Find a table of a comparison.

    :param report: The comparison.
    :param name: ``table1`` or ``table2``.

    :returns: The table, if it is there.
    """
    wanted = f"{report.name}_{name}"

    return next((table for table in report.tables if table.name == wanted), None)


def format_difference(column: Column, pair: Pair, *, sign: int = 1) -> str:
    """Write how much the first of a pair differs from the second.

    :param column: The metric.
    :param pair: The pair, tested.
    :param sign: -1 to write how much the second differs from the first.

    :returns: Difference, 95 % interval and adjusted p-value.
    """
    estimate = pair.estimate
    assert estimate is not None
    assert pair.adjusted_p_value is not None

    value = sign * estimate.value
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    p_value = f"p = {pair.adjusted_p_value:.2g}"

    if column.log_scale:
        ratios = [f"{_exp(number):.3g}" for number in (value, low, high)]

        return f"{ratios[0]} times [{ratios[1]}, {ratios[2]}], {p_value}"

    unit = column.unit
    if unit.startswith("share"):
        value, low, high = (100.0 * number for number in (value, low, high))
        unit = "percentage points"

    digits = ".3f" if abs(value) >= 0.1 else ".4f"

    return f"{value:+{digits}} [{low:+{digits}}, {high:+{digits}}] {unit}, {p_value}"


def describe_cost(report: ComparisonReport, row: Row) -> str:
    """Say what a row costs.

    :param report: The comparison.
    :param row: The row.

    :returns: FLOPs, parameters, speed, memory and time, as far as known.
    """
    flops = find_flops(report, row)
    parts = [] if flops is None else [f"{flops / 1e6:,.1f} MFLOP per token"]

    parts += [
        f"{format_cell(COLUMNS_BY_KEY[key], row)} {unit}"
        for key, unit in _COST_UNITS.items()
        if key in row.statistics
    ]

    return ", ".join(parts) or "not recorded"


def _exp(value: float) -> float:
    # An interval of two seeds may be too wide for a ratio.
    return math.exp(value) if value < 700.0 else math.inf
