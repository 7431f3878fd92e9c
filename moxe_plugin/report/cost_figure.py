"""What quality costs: speed, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moxe_plugin.report.architectures import Architecture, find_architecture
from moxe_plugin.report.columns import COLUMNS_BY_KEY, LAMBADA_PERPLEXITY
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.rows import Row, Statistic
from moxe_plugin.report.styles import (
    DrawnFigure,
    create_figure,
    finish_figure,
    style_axes,
    system_style,
    tick_decades,
)

Number = Callable[[Row], Statistic | None]


def draw_cost_figure(
    name: str,
    caption: str,
    comparison: Comparison,
    architectures: Sequence[Architecture],
) -> DrawnFigure | None:
    """Draw quality against tokens per second, memory and FLOPs.

    :param name: What the name of the file begins with.
    :param caption: Data, seeds and size.
    :param comparison: The rows.
    :param architectures: What `moxe systems` found.

    :returns: The figure; ``None`` if no row has both.
    """
    costs: list[tuple[str, Number]] = [
        ("training tokens per second", _read("throughput_tokens_per_s")),
        ("peak memory of training, GiB", _read("peak_memory_gib")),
        ("forward pass, MFLOP per token", lambda row: _read_flops(row, architectures)),
    ]
    rows = comparison.trained_rows

    qualities = [
        COLUMNS_BY_KEY[key]
        for key in ("valid_loss_nats", LAMBADA_PERPLEXITY)
        if any(key in row.statistics for row in rows)
    ]
    panels = [
        (heading, read)
        for heading, read in costs
        if any(read(row) is not None for row in rows)
    ]

    if not panels or not qualities:
        return None

    title = "Quality against its cost"
    caption = (
        "Lower is better; in the first column right is better, in the others left. "
        "Marks: mean over seeds; bars: sample standard deviation over seeds. Speed and "
        f"memory are of the machines that the table names. {caption}"
    )
    figure = create_figure(
        title,
        caption,
        width=4.0 * len(panels) + 2.2,
        height=3.4 * len(qualities) + 1.4,
    )
    grid = figure.subplots(
        len(qualities), len(panels), squeeze=False, sharey="row", sharex="col"
    )

    for line, quality in zip(grid, qualities, strict=True):
        for axes, (_, read) in zip(line, panels, strict=True):
            _draw_points(axes, rows, read, quality)

        line[0].set_ylabel(quality.heading)
        if quality.log_scale:
            line[0].set_yscale("log")
            tick_decades(line[0].yaxis, line[0].get_ylim())

    for axes, (heading, _) in zip(grid[-1], panels, strict=True):
        axes.set_xlabel(heading)

    grid[0][-1].legend(
        handles=[_legend_entry(row) for row in rows],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=8.5,
    )

    return finish_figure(f"{name}_cost", title, caption, figure)


def _read(key: str) -> Number:
    return lambda row: row.statistics.get(key)


def _read_flops(row: Row, architectures: Sequence[Architecture]) -> Statistic | None:
    model = row.records[0].model
    assert model is not None

    found = find_architecture(architectures, model.family, model.arch)

    return None if found is None else Statistic(found.flops_per_token / 1e6, None, 1)


def _draw_points(
    axes: Axes, rows: Sequence[Row], read: Number, quality: Column
) -> None:
    for row in rows:
        cost, value = read(row), row.statistics.get(quality.key)
        if cost is None or value is None:
            continue

        colour, marker, _ = system_style(row.system)
        axes.errorbar(
            cost.mean,
            value.mean,
            xerr=cost.sd,
            yerr=value.sd,
            color=colour,
            marker=marker,
            markersize=8,
            elinewidth=1,
            alpha=0.9,
        )

    style_axes(axes)
    axes.margins(0.12)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.locator_params(axis="x", nbins=5)


def _legend_entry(row: Row) -> Line2D:
    colour, marker, _ = system_style(row.system)

    return Line2D(
        [],
        [],
        linestyle="none",
        color=colour,
        marker=marker,
        markersize=8,
        label=row.marked_label,
    )
