"""Metrics over training: the paper's Figure 3, and what Figure 8 is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.curves import Curve, Split, list_layers, read_curves
from moxe_plugin.report.measurements import NLL_KEY
from moxe_plugin.report.rows import Row
from moxe_plugin.report.styles import (
    GUESS_COLOUR,
    DrawnFigure,
    create_figure,
    finish_figure,
    style_axes,
    system_style,
)

_TABLE_1_SYSTEMS: Final = ("moxe", "xlstm", "qwen_moe", "gemma2")
"""The systems of the paper's Figure 3."""

_BAND: Final = "Lines: mean over seeds; bands: lowest to highest seed."

_SHARE_SYSTEMS: Final = ("moxe", "moxe_no_group_loss", "moxe_gamma0", "moxe_standard")
"""Systems with both groups of experts."""

_GUESSED: Final = "valid_loss_nats"
"""The one number of training that a guess has."""

_MAX_COLUMNS: Final = 4
"""Panels beside each other at most."""

_SHOWN_FROM: Final = 0.1
"""The share of training after which all of a loss must be within the axis."""


_GUESS_DASHES: Final = {"uniform": ":", "unigram": "--"}


class _Panel(NamedTuple):
    key: str
    title: str
    split: Split
    metric: str
    unit: str
    note: str = ""


_FIGURE_3: Final = (
    _Panel("3a", "training loss", "train", NLL_KEY, "nats per token"),
    _Panel("3b", "loss on held-out text", "valid", NLL_KEY, "nats per token"),
    _Panel("3c", "router z-loss", "train", "Router Z Loss", "mean over layers"),
    _Panel(
        "3d",
        "load-balance loss",
        "train",
        "Load Balance Loss",
        "mean over layers",
        "Balanced routing has 1, in Qwen1.5-MoE's own form its top k.",
    ),
)


def draw_training_figures(
    name: str, caption: str, comparison: Comparison
) -> list[DrawnFigure]:
    """Draw Figures 3a to 3d as far as there are numbers.

    :param name: What the names of files begin with.
    :param caption: Data, seeds and size.
    :param comparison: The rows.

    :returns: The figures.
    """
    figures = []

    for panel in _FIGURE_3:
        curves = read_curves(comparison.trained_rows, panel.split, panel.metric)
        if curves:
            guesses = _guesses(comparison, panel)
            figures.append(_draw_panel(name, caption, panel, curves, guesses))

    return figures


def draw_share_figure(
    name: str, caption: str, comparison: Comparison
) -> DrawnFigure | None:
    """Draw how the groups of experts share the tokens, with and without group loss.

    :param name: What the name of the file begins with.
    :param caption: Data, seeds and size.
    :param comparison: The rows.

    :returns: The figure; ``None`` unless a router with two groups was recorded.
    """
    rows = [row for row in comparison.trained_rows if row.system in _SHARE_SYSTEMS]
    layers = list_layers(rows, "mlstm_share")

    if not layers:
        return None

    metrics = (
        ("mlstm_share", "share of the mLSTM experts", 0.5),
        ("busiest_expert_share", "share of the busiest expert", None),
    )

    num_columns = min(len(layers), _MAX_COLUMNS)
    num_lines = -(-len(layers) // num_columns)

    title = "Figure 8's subject: which experts get the tokens during training"
    caption = (
        f"Share of the places (tokens times top k) that go to a group or an expert. "
        f"Dashed: half. {_BAND} {caption}"
    )
    figure = create_figure(
        title,
        caption,
        width=3.4 * num_columns + 2.4,
        height=2.6 * num_lines * len(metrics) + 1.0,
    )
    grid = figure.subplots(
        num_lines * len(metrics), num_columns, squeeze=False, sharex=True, sharey="row"
    )

    for number, (metric, heading, half) in enumerate(metrics):
        for idx, layer in enumerate(layers):
            line, column = divmod(idx, num_columns)
            axes = grid[number * num_lines + line][column]

            curves = read_curves(rows, "train", f"layer_{layer}/{metric}")
            for curve in curves:
                _draw_curve(axes, curve, curve.row.marked_label)

            if half is not None:
                axes.axhline(half, color=GUESS_COLOUR, linestyle="--", linewidth=1)

            axes.set_ylim(0, 1)
            axes.set_title(f"Layer {layer}", loc="left", fontsize=10)
            if column == 0:
                axes.set_ylabel(heading, fontsize=9)
            _style_tokens(axes)

    _drop_unused(grid, len(layers), num_lines, len(metrics))
    _add_legend(grid[0][num_columns - 1])

    return finish_figure(f"{name}_fig8", title, caption, figure)


def _draw_panel(
    name: str,
    caption: str,
    panel: _Panel,
    curves: Sequence[Curve],
    guesses: Sequence[Row],
) -> DrawnFigure:
    paper = [c for c in curves if c.row.system in _TABLE_1_SYSTEMS]
    ablations = [c for c in curves if c.row.system == "moxe" or c not in paper]
    parts = [
        (heading, part)
        for heading, part in (
            ("The systems of Table 1", paper),
            ("MoxE and its variants", ablations),
        )
        # The full model alone is in the other part already.
        if any(c.row.system != "moxe" for c in part)
    ] or [("", list(curves))]

    title = f"Figure {panel.key}: {panel.title}"
    caption = " ".join(text for text in (_BAND, panel.note, caption) if text)
    figure = create_figure(title, caption, width=6.2 * len(parts), height=4.6)
    grid = figure.subplots(1, len(parts), squeeze=False, sharey=True)

    for axes, (heading, part) in zip(grid[0], parts, strict=True):
        _draw_lines(axes, part, guesses)
        axes.set_title(heading, loc="left", fontsize=10)

    grid[0][0].set_ylabel(f"{panel.title}, {panel.unit}")
    _limit(grid[0][0], curves, guesses)

    return finish_figure(f"{name}_fig{panel.key}", title, caption, figure)


def _draw_lines(axes: Axes, curves: Sequence[Curve], guesses: Sequence[Row]) -> None:
    # The legend's order is that of the lines' ends, highest first.
    entries = [(float(curve.mean[-1]), curve) for curve in curves]

    for value, curve in sorted(entries, key=lambda e: -e[0]):
        _draw_curve(axes, curve, f"{curve.row.marked_label} ({value:#.3g})")

    for guess in guesses:
        value = guess.statistics[_GUESSED].mean
        axes.axhline(
            value,
            color=GUESS_COLOUR,
            linestyle=_GUESS_DASHES.get(guess.system, "-."),
            linewidth=1.2,
            label=f"{guess.label} ({value:#.3g})",
        )

    _style_tokens(axes)
    _add_legend(axes)


def _draw_curve(axes: Axes, curve: Curve, label: str) -> None:
    colour, marker, dashes = system_style(curve.row.system)

    axes.fill_between(
        curve.tokens, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(
        curve.tokens,
        curve.mean,
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        marker=marker,
        markersize=5,
        markevery=max(1, len(curve.tokens) // 6),
        label=label,
    )


def _guesses(comparison: Comparison, panel: _Panel) -> list[Row]:
    if panel.split != "valid":
        return []

    return [
        row for row in comparison.rows if row.is_guess and _GUESSED in row.statistics
    ]


def _limit(axes: Axes, curves: Sequence[Curve], guesses: Sequence[Row]) -> None:
    guessed = [guess.statistics[_GUESSED].mean for guess in guesses]
    low = min([*guessed, *(float(curve.low.min()) for curve in curves)])

    # The first points are those of an untrained model, far above all that follows.
    last = max(float(curve.tokens[-1]) for curve in curves)
    high = max(
        [
            *guessed,
            *(
                float(curve.high[curve.tokens >= _SHOWN_FROM * last].max())
                for curve in curves
            ),
        ]
    )
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0

    axes.set_ylim(low - margin, high + margin)


def _style_tokens(axes: Axes) -> None:
    style_axes(axes)
    axes.set_xlabel("training tokens", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    # Panels below may be missing.
    axes.tick_params(labelsize=8, labelbottom=True)


def _add_legend(axes: Axes) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5
    )


def _drop_unused(
    grid: np.ndarray[tuple[int, ...], np.dtype[np.object_]],
    num_panels: int,
    num_lines: int,
    num_blocks: int,
) -> None:
    num_columns = grid.shape[1]

    for block in range(num_blocks):
        for idx in range(num_panels, num_lines * num_columns):
            line, column = divmod(idx, num_columns)
            grid[block * num_lines + line][column].remove()
