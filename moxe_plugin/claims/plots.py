"""Plots of what was measured, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moxe_plugin.claims.evidence import Evidence
from moxe_plugin.claims.judging import NOT_SUPPORTED, SUPPORTED, Answer, Judgement
from moxe_plugin.claims.systems import label_system
from moxe_plugin.claims.tables import (
    odds_table,
    rarity_table,
    share_table,
    time_table,
)
from moxe_plugin.report.statistics import Estimate

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS: Final = {
    "moxe": "#0072B2",
    "moxe_no_group_loss": "#D55E00",
    "moxe_gamma0": "#009E73",
    "moxe_standard": "#CC79A7",
    "moxe_token": "#56B4E9",
    "moxe_dense": "#000000",
    "xlstm": "#E69F00",
    "gemma2": "#D55E00",
    "qwen_moe": "#009E73",
}
_MARKERS: Final = {
    "moxe": "o",
    "moxe_no_group_loss": "s",
    "moxe_gamma0": "^",
    "moxe_standard": "D",
    "moxe_token": "v",
    "moxe_dense": "P",
    "xlstm": "X",
    "gemma2": "s",
    "qwen_moe": "^",
}
_VERDICT_STYLES: Final = {SUPPORTED: ("#0072B2", "o"), NOT_SUPPORTED: ("#D55E00", "X")}
_UNDECIDED_STYLE: Final = ("#777777", "D")

_ROUTED_SYSTEMS: Final = (
    "moxe",
    "moxe_no_group_loss",
    "moxe_gamma0",
    "moxe_standard",
)
"""Systems with two groups of experts that plots of routing show."""


def write_plots(
    directory: Path,
    evidence: Evidence,
    judgements: Sequence[Judgement],
    times: Mapping[str, Any] | None,
) -> list[str]:
    """Draw all plots that there are numbers for.

    :param directory: Where the files go, ``<plot>.png`` and ``<plot>.svg``.
    :param evidence: The measured runs.
    :param judgements: The judged claims.
    :param times: Measured times, if there are any.

    :returns: The names of the plots.
    """
    figures = {
        "losses": _plot_losses(judgements),
        "rarity": _plot_rarity(rarity_table(evidence)),
        "shares": _plot_shares(share_table(evidence)),
        "odds": _plot_odds(odds_table(evidence)),
        "time": None if times is None else _plot_time(time_table(times)),
    }

    drawn = {name: figure for name, figure in figures.items() if figure is not None}

    # Nothing that changes from call to call goes into the files.
    with mpl.rc_context({"svg.hashsalt": "moxe"}):
        for name, figure in drawn.items():
            figure.savefig(directory / f"{name}.png", metadata={"Software": None})
            figure.savefig(
                directory / f"{name}.svg", metadata={"Date": None, "Creator": None}
            )

    return list(drawn)


def _plot_losses(judgements: Sequence[Judgement]) -> Figure | None:
    by_unit: dict[str, list[tuple[str, Answer, Estimate]]] = {}

    for judgement in judgements:
        for answer in judgement.answers:
            if answer.question.unit and answer.estimate is not None:
                entry = (judgement.claim.key, answer, answer.estimate)
                by_unit.setdefault(answer.question.unit, []).append(entry)

    if not by_unit:
        return None

    heights = [len(entries) + 2 for entries in by_unit.values()]

    figure = Figure(figsize=(10, 0.33 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(by_unit), 1, squeeze=False, height_ratios=heights)

    for axes, (unit, entries) in zip(grid[:, 0], by_unit.items(), strict=True):
        _plot_intervals(axes, entries)
        axes.set_xlabel(f"{unit}, 95 % interval; bar: the bound in the claim")

    return figure


def _plot_intervals(
    axes: Axes, entries: Sequence[tuple[str, Answer, Estimate]]
) -> None:
    shown = set()

    for row, (_, answer, estimate) in enumerate(entries):
        colour, marker = _VERDICT_STYLES.get(answer.verdict, _UNDECIDED_STYLE)
        label = None if answer.verdict in shown else answer.verdict
        shown.add(answer.verdict)

        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2)
        axes.plot(
            estimate.value, row, marker, color=colour, label=label, linestyle="none"
        )
        axes.plot(answer.question.bound, row, "|", color="black", markersize=14)

    # An interval of few seeds can be so wide that nothing else could be read.
    reach = 2.0 * max(abs(estimate.value) for _, _, estimate in entries) or 1.0
    axes.set_xlim(-reach, reach)

    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(entries)),
        [f"({key}) {answer.question.text}" for key, answer, _ in entries],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _plot_rarity(table: pd.DataFrame) -> Figure | None:
    def draw(axes: Axes, column: str, part: pd.DataFrame) -> None:
        _plot_seeds(axes, part, "rarity_tenth", column)
        axes.set_xlabel("tenth of the training text, by rarity of the token")
        axes.set_xticks([0, 9], ["most frequent", "rarest"])
        axes.set_ylim(0, 1)

    return _plot_layers(
        table,
        {
            "mlstm_share": "share of places with mLSTM experts",
            "difficulty": "mean predicted difficulty",
        },
        draw,
    )


def _plot_shares(table: pd.DataFrame) -> Figure | None:
    def draw(axes: Axes, column: str, part: pd.DataFrame) -> None:
        _plot_seeds(axes, part, "training_tokens", column)
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(0, 1)
        axes.axhline(0.5, color="#999999", linestyle="--", linewidth=1)

    return _plot_layers(
        table, {"mlstm_share": "share of places with mLSTM experts"}, draw
    )


def _plot_odds(table: pd.DataFrame) -> Figure | None:
    def draw(axes: Axes, column: str, part: pd.DataFrame) -> None:
        _plot_seeds(axes, part, "bias", column, with_mean=False)
        limits = [0.0, float(part["bias"].max())]
        label = "raw odds of 1: $e^{2 \\gamma d}$"
        axes.plot(limits, limits, "--", color="black", linewidth=1, label=label)
        axes.set_xlabel("bias $2 \\gamma d$")

    if not table.empty:
        table = table[table["system"] == "moxe"]

    return _plot_layers(table, {"log_odds": "mean ln(P_m / P_s)"}, draw)


def _plot_time(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()

    for system, part in table.groupby("system", sort=False):
        axes.plot(
            part["length"],
            part["min_us_per_token"],
            color=_COLOURS.get(str(system), "#777777"),
            marker=_MARKERS.get(str(system), "."),
            label=label_system(str(system)),
        )

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set_xlabel("length of the text, tokens")
    axes.set_ylabel("microseconds per token, fastest round")
    axes.grid(which="both", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)

    return figure


def _plot_layers(
    table: pd.DataFrame,
    columns: Mapping[str, str],
    draw: Callable[[Axes, str, pd.DataFrame], None],
) -> Figure | None:
    if not table.empty:
        table = table[table["system"].isin(_ROUTED_SYSTEMS)]

    if table.empty:
        return None

    layers = sorted(table["layer"].unique())

    figure = Figure(figsize=(11, 4.0 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(columns), squeeze=False)

    for line, layer in zip(grid, layers, strict=True):
        for axes, (column, heading) in zip(line, columns.items(), strict=True):
            part = table[table["layer"] == layer]
            if column in part:
                draw(axes, column, part.dropna(subset=[column]))
            axes.set_title(f"Layer {layer}", loc="left", fontsize=11)
            axes.set_ylabel(heading)
            axes.grid(alpha=0.3)

    grid[0][0].legend(frameon=False, fontsize=9)

    return figure


def _plot_seeds(
    axes: Axes, table: pd.DataFrame, x: str, y: str, *, with_mean: bool = True
) -> None:
    for name in _ROUTED_SYSTEMS:
        part = table[table["system"] == name]
        if part.empty:
            continue

        style: dict[str, Any] = {"color": _COLOURS[name], "label": label_system(name)}

        for seed, run in part.groupby("seed"):
            thin: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.5}
            label = f"{style['label']}, seed {seed}" if not with_mean else None
            axes.plot(
                run[x],
                run[y],
                **{**style, **(thin if with_mean else {}), "label": label},
                marker=None if with_mean else ("o", "s", "^", "D")[int(str(seed)) % 4],
            )

        if with_mean:
            mean = part.groupby(x)[y].mean()
            axes.plot(
                mean.index,
                mean,
                **style,
                linewidth=2,
                marker=_MARKERS[name],
                markersize=5,
            )
