"""All pairs of systems as one table of the page."""

from __future__ import annotations

import pandas as pd

from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.pair_tables import pair_cells
from moxe_plugin.report.pairs import Pair
from moxe_plugin.report_page.page_tables import (
    Cell,
    Heading,
    PageTable,
    TableRow,
    number_value,
)


def pair_table(comparison: Comparison) -> PageTable | None:
    """List all pairs of systems that were tested, in all metrics.

    :param comparison: The comparison.

    :returns: The table; ``None`` without a tested pair.
    """
    systems = {id(row): str(idx) for idx, row in enumerate(comparison.rows)}

    frames = []
    filters = []
    values: list[list[float | None]] = []

    for metric in comparison.pairs:
        pairs = [p for p in (*metric.pairs, *metric.guess_pairs) if p.estimate]
        if not pairs:
            continue

        cells = pair_cells(metric, pairs)
        cells.insert(0, "metric", metric.column.heading)
        cells["over"] = [_describe_basis(pair) for pair in pairs]
        frames.append(cells)

        for pair in pairs:
            first, second = systems[id(pair.first)], systems[id(pair.second)]
            filters.append(
                {"metric": metric.column.key, "first": first, "second": second}
            )
            values.append(_pair_values(pair))

    if not frames:
        return None

    names = [
        ("metric", ""),
        ("first", ""),
        ("second", ""),
        ("difference", "first less second, in the metric's unit; of logarithms for "
         "perplexities"),
        ("95 % interval", "of the difference"),
        ("ratio", "what a difference of logarithms comes to: 0.9 is a perplexity "
         "lower by a tenth"),
        ("p", "two-sided test of no difference"),
        ("p, Holm", "adjusted by Holm's method over all pairs of the metric"),
        ("first is", "decided only if p, Holm is below 0.05 and the interval excludes "
         "0"),
        ("over", "what the uncertainty is over"),
    ]  # fmt: skip
    numbers = ("difference", "ratio", "p", "p, Holm")

    frame = pd.concat(frames, ignore_index=True)
    # No metric has ratios if none is a perplexity.
    names = [(name, title) for name, title in names if name in frame.columns]
    frame = frame.reindex(columns=[name for name, _ in names]).fillna(DASH)

    rows = []
    for texts, row_filters, numbers_of_row in zip(
        frame.itertuples(index=False), filters, values, strict=True
    ):
        sort_values = dict(zip(numbers, numbers_of_row, strict=True))
        rows.append(
            TableRow(
                cells=[
                    Cell(text=text, value=_optional(sort_values.get(name)))
                    for text, (name, _) in zip(texts, names, strict=True)
                ],
                filters=row_filters,
            )
        )

    return PageTable(
        caption="Pairs of systems",
        headings=[
            Heading(text=name, title=title, is_number=name in numbers)
            for name, title in names
        ],
        rows=rows,
    )


def _pair_values(pair: Pair) -> list[float | None]:
    value = None if pair.estimate is None else pair.estimate.value

    # A ratio sorts as its logarithm does.
    return [value, value, pair.p_value, pair.adjusted_p_value]


def _describe_basis(pair: Pair) -> str:
    if pair.basis is None:
        return DASH

    seeds = f"{len(pair.seeds)} seeds"

    return seeds if pair.num_items is None else f"{pair.num_items:,} items, {seeds}"


def _optional(number: float | None) -> str | None:
    return None if number is None else number_value(number)
