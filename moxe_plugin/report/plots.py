"""Plots of a suite: loss over training, and perplexity beside the guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moxe_plugin.report.comparison import Comparison, Row, SuiteResults
from moxe_plugin.report.measurements import NLL_KEY
from moxe_plugin.report.records import RunRecord

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)

_GUESS_COLOUR: Final = "#999999"


def plot_suite(results: SuiteResults, file: Path) -> None:
    """Draw loss curves and perplexities, one line of plots for each comparison.

    :param results: The suite.
    :param file: The PNG file.
    """
    num_lines = max(1, len(results.comparisons))

    figure = Figure(figsize=(12, 4.6 * num_lines), layout="constrained")
    axes = figure.subplots(num_lines, 2, squeeze=False)

    for comparison, (curves, bars) in zip(results.comparisons, axes, strict=False):
        colours = _assign_colours(comparison.rows)

        _plot_curves(curves, comparison, colours)
        _plot_perplexities(bars, comparison, colours)

    # Matplotlib's own metadata names its version, which would change the file.
    figure.savefig(file, format="png", metadata={"Software": None})


def _assign_colours(rows: Sequence[Row]) -> dict[int, str]:
    # By name, so that a system keeps its colour when the order of rows changes.
    trained = sorted(
        (row for row in rows if not row.is_guess), key=lambda row: row.system
    )

    return {id(row): _COLOURS[i % len(_COLOURS)] for i, row in enumerate(trained)} | {
        id(row): _GUESS_COLOUR for row in rows if row.is_guess
    }


def _plot_curves(
    axes: Axes, comparison: Comparison, colours: Mapping[int, str]
) -> None:
    for row in comparison.rows:
        colour = colours[id(row)]
        statistic = row.statistics.get("valid_loss_nats")

        if row.is_guess and statistic is not None:
            axes.axhline(statistic.mean, color=colour, linestyle="--", linewidth=1)
            axes.annotate(
                row.label,
                (1, statistic.mean),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="#666666",
            )

        for i, record in enumerate(row.records):
            label = row.label if i == 0 and not row.is_guess else None

            tokens, losses = _curve(record, record.train)
            axes.plot(tokens, losses, color=colour, linewidth=0.8, alpha=0.5)

            tokens, losses = _curve(record, record.valid)
            axes.plot(
                tokens, losses, color=colour, linewidth=1.8, marker=".", label=label
            )

    axes.set_title(f"Loss on `{comparison.data.name}`", loc="left", fontsize=11)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylabel("nats per token (bold: held-out, thin: training)")
    axes.grid(alpha=0.3)

    if any(not row.is_guess for row in comparison.rows):
        axes.legend(frameon=False, fontsize=9)


def _curve(
    record: RunRecord, lines: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[float]]:
    last_step = max((step for step, _ in _points(record.train)), default=1)

    # Systems may take different numbers of steps for the same tokens.
    tokens_per_step = (record.environment.training_tokens or 0) / last_step

    points = _points(lines)

    return [step * tokens_per_step for step, _ in points], [loss for _, loss in points]


def _points(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [
        (line["Step"], line[NLL_KEY])
        for line in lines
        if line.get("Stage") == "pretrain" and NLL_KEY in line and "Step" in line
    ]


def _plot_perplexities(
    axes: Axes, comparison: Comparison, colours: Mapping[int, str]
) -> None:
    key = "valid_perplexity_per_token"

    rows = [row for row in reversed(comparison.rows) if key in row.statistics]
    means = [row.statistics[key].mean for row in rows]
    errors = [row.statistics[key].sd or 0.0 for row in rows]

    bars = axes.barh(
        range(len(rows)),
        means,
        xerr=errors if any(errors) else None,
        color=[colours[id(row)] for row in rows],
        height=0.65,
    )

    axes.bar_label(bars, [f"{mean:,.1f}" for mean in means], padding=5, fontsize=9)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_xscale("log")
    axes.set_title("Held-out perplexity per token (log scale)", loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    # Bars begin at 1, the perplexity of someone who knows the text by heart.
    axes.set_xlim(1, max([2.0, *means]) * 5)
