"""The paper's Figure 4: perplexity by model, the paper's beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes

from moxe_plugin.report.columns import COLUMNS_BY_KEY, LAMBADA_PERPLEXITY
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.paper import Paper
from moxe_plugin.report.rows import Row
from moxe_plugin.report.styles import (
    GUESS_COLOUR,
    DrawnFigure,
    create_figure,
    finish_figure,
    style_axes,
    system_style,
    tick_decades,
)

_STAND_IN: Final = "valid_perplexity_per_token"
"""What Figure 4 shows where LAMBADA was not measured."""


def draw_perplexity_figure(
    name: str, caption: str, comparison: Comparison, paper: Paper | None
) -> DrawnFigure | None:
    """Draw the perplexity of each model, the paper's beside ours.

    :param name: What the name of the file begins with.
    :param caption: Data, seeds and size.
    :param comparison: The rows.
    :param paper: The paper's numbers.

    :returns: The figure; ``None`` if no row has a perplexity.
    """
    has_lambada = any(
        LAMBADA_PERPLEXITY in row.statistics for row in comparison.trained_rows
    )
    column = COLUMNS_BY_KEY[LAMBADA_PERPLEXITY if has_lambada else _STAND_IN]

    rows = [row for row in comparison.rows if column.key in row.statistics]
    if not any(not row.is_guess for row in rows):
        return None

    rows.sort(key=lambda row: -row.statistics[column.key].mean)
    printed = _paper_perplexities(paper) if has_lambada else []

    title = f"Figure 4: {column.heading} by model"
    notes = [
        "Large mark: mean over seeds; small marks: seeds.",
        "Bar: 95 % interval over passages." if has_lambada else "",
        "The paper's panel has another size, other data and one seed, and does not say "
        "whether its perplexity is per word or per token; its Figure 4 has no numbers "
        "in the text, those shown are of its Table 2."
        if printed
        else "",
        caption,
    ]
    caption = " ".join(note for note in notes if note)

    num_panels = 2 if printed else 1
    height = 0.34 * max(len(rows), len(printed)) + 1.9
    figure = create_figure(title, caption, width=7.0 * num_panels, height=height)
    grid = figure.subplots(1, num_panels, squeeze=False)

    _draw_rows(grid[0][0], rows, column)
    if printed:
        _draw_printed(grid[0][1], printed)

    return finish_figure(f"{name}_fig4", title, caption, figure)


def _draw_rows(axes: Axes, rows: Sequence[Row], column: Column) -> None:
    for height, row in enumerate(rows):
        statistic = row.statistics[column.key]
        colour, marker = GUESS_COLOUR, "|"
        if not row.is_guess:
            colour, marker, _ = system_style(row.system)

        if statistic.low is not None and statistic.high is not None:
            axes.plot(
                [statistic.low, statistic.high],
                [height, height],
                color=colour,
                linewidth=4,
                alpha=0.35,
                solid_capstyle="butt",
            )

        seeds = [column.read(record) for record in row.records]
        points = [seed for seed in seeds if seed is not None]
        if len(points) > 1:
            axes.plot(
                points,
                [height] * len(points),
                linestyle="none",
                marker=".",
                color=colour,
                alpha=0.7,
                markersize=5,
            )

        axes.plot(statistic.mean, height, marker=marker, color=colour, markersize=9)

    labels = [
        f"{row.marked_label}  {_format(row.statistics[column.key].mean)}"
        for row in rows
    ]
    _style_logarithmic(axes, labels, f"{column.heading} (log scale)")
    axes.set_title("Ours", loc="left", fontsize=10)


def _draw_printed(axes: Axes, printed: Sequence[tuple[str, str, float]]) -> None:
    for height, (system, _, value) in enumerate(printed):
        colour, marker, _ = system_style(system)
        axes.plot(
            value,
            height,
            marker=marker,
            color=colour,
            markerfacecolor="white",
            markersize=9,
        )

    labels = [f"{label}  {value:,.0f}" for _, label, value in printed]
    _style_logarithmic(axes, labels, "LAMBADA perplexity (log scale)")
    axes.set_title("The paper's", loc="left", fontsize=10)


def _style_logarithmic(axes: Axes, labels: Sequence[str], heading: str) -> None:
    axes.set_xscale("log")
    tick_decades(axes.xaxis, axes.get_xlim())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel(heading)
    style_axes(axes, grid="x")


def _format(perplexity: float) -> str:
    return format(perplexity, ",.1f" if perplexity < 1000.0 else ",.0f")


def _paper_perplexities(paper: Paper | None) -> list[tuple[str, str, float]]:
    table = paper.table("table2") if paper else None
    if table is None:
        return []

    values = [
        (systems[0], _shorten(str(row[0])), float(row[1]))
        for row, systems in zip(table.rows, table.systems, strict=True)
        if isinstance(row[1], (int, float))
    ]

    return sorted(values, key=lambda value: -value[2])


def _shorten(configuration: str) -> str:
    # What is in parentheses is the configuration's name.
    return configuration.split("(")[-1].removesuffix(")")
