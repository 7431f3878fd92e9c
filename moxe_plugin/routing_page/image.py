"""The routing of a text as an image, one panel for each layer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from moxe_plugin.routing_page.colours import (
    MLSTM_COLOUR,
    SLSTM_COLOUR,
    scale_steps,
    step_of,
)
from moxe_plugin.routing_page.pieces import Piece, Placed, lay_out
from moxe_plugin.routing_page.view import GROUP_NAMES, LayerSummary, RoutingView

MAX_TOKENS: Final = 300
"""How much of a text an image shows; the page shows all of it."""

_NUM_COLUMNS: Final = 100
_FONT: Final = "DejaVu Sans Mono"
_FONT_SIZE: Final = 10.0
# In points. The font's characters are 0.602 of its size wide.
_COLUMN: Final = 0.602 * _FONT_SIZE
_LINE: Final = 21.0
_MARGIN: Final = 18.0
_SMALL: Final = 9.0
_NUM_CAPTION_COLUMNS: Final = 112


def draw_image(view: RoutingView, file: Path) -> None:
    """Draw the first ``MAX_TOKENS`` tokens, coloured and marked, layer by layer.

    Characters that the font lacks are drawn as boxes.

    :param view: What to show.
    :param file: The PNG file.
    """
    pieces = [Piece(_draw_able(p.text), p.owner) for p in view.pieces[:MAX_TOKENS]]
    # As many columns as characters: the font has one width for all.
    lines = lay_out(pieces, _NUM_COLUMNS, len)

    num_layers = len(view.trace.layers)
    captions = _caption(view)
    header_height = (4.6 + 0.7 * len(captions)) * _LINE
    panel_height = (len(lines) + 1.8) * _LINE

    width = _NUM_COLUMNS * _COLUMN + 2 * _MARGIN
    height = header_height + num_layers * panel_height + _MARGIN

    # Points are the axes' unit, and y points down.
    figure = Figure(figsize=(width / 72, height / 72), dpi=140)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()

    _draw_header(axes, view, captions)

    for idx in range(num_layers):
        _draw_layer(axes, view, idx, lines, header_height + idx * panel_height)

    # Matplotlib's own metadata names its version, which would change the file.
    figure.savefig(file, format="png", metadata={"Software": None})


def _caption(view: RoutingView) -> list[str]:
    shown = f"{len(view.pieces):,} tokens."
    if len(view.pieces) > MAX_TOKENS:
        shown = f"The first {MAX_TOKENS:,} of {len(view.pieces):,} tokens."

    caption = " ".join([shown, *view.notes, view.source or ""])

    return textwrap.wrap(caption, _NUM_CAPTION_COLUMNS)


def _draw_header(axes: Axes, view: RoutingView, captions: Sequence[str]) -> None:
    colouring = view.colourings()[0]

    y = _MARGIN + 6
    axes.text(
        _MARGIN,
        y,
        f"Routing by {view.title}",
        fontsize=12,
        weight="bold",
        parse_math=False,
    )

    for line in captions:
        y += 0.7 * _LINE
        axes.text(_MARGIN, y, line, fontsize=_SMALL, color="#555555", parse_math=False)

    y += 1.2 * _LINE
    axes.text(_MARGIN, y, f"{colouring.label}: ≤ {colouring.low:.2f}", fontsize=_SMALL)
    x = _MARGIN + 5.2 * (len(colouring.label) + 9)

    for step in scale_steps():
        axes.add_patch(Rectangle((x, y - 9), 14, 11, color=step.fill, linewidth=0))
        x += 14

    axes.text(x + 5, y, f"≥ {colouring.high:.2f}", fontsize=_SMALL)

    present = {mark for layer in view.trace.layers for mark in view.marks(layer)}
    x, y = _MARGIN, y + 1.1 * _LINE

    for mark, name in GROUP_NAMES.items():
        if mark in present:
            share = {"m": 1.0, "s": 0.0, "ms": 0.5}[mark]
            _draw_mark(axes, x, y - 3, 26, share)
            axes.text(x + 32, y, name, fontsize=_SMALL)
            x += 160


def _draw_layer(
    axes: Axes,
    view: RoutingView,
    idx: int,
    lines: list[list[Placed]],
    top: float,
) -> None:
    layer = view.trace.layers[idx]
    colouring = view.colourings()[0]
    shares = view.mlstm_shares(layer)
    steps = scale_steps()

    axes.text(
        _MARGIN,
        top,
        f"Layer {idx}: {_describe(view.summarize(layer))}",
        fontsize=_SMALL + 1,
        weight="bold",
    )

    for line_idx, line in enumerate(lines):
        y = top + (line_idx + 1.1) * _LINE

        for token in line:
            value = float(colouring.values[idx][token.idx])
            step = steps[step_of(value, colouring.low, colouring.high)]

            x = _MARGIN + token.column * _COLUMN
            width = token.width * _COLUMN

            axes.add_patch(
                Rectangle(
                    (x, y - 10), width - 0.7, 13, facecolor=step.fill, linewidth=0
                )
            )
            axes.text(
                x,
                y,
                token.text,
                fontsize=_FONT_SIZE,
                family=_FONT,
                color=step.ink,
                # A dollar sign is no mathematics.
                parse_math=False,
            )

            if shares is not None:
                _draw_mark(axes, x, y + 5, width - 0.7, float(shares[token.idx]))


def _draw_mark(axes: Axes, x: float, y: float, width: float, share: float) -> None:
    middle = x + share * width

    if share > 0.0:
        axes.add_collection(
            LineCollection([[(x, y), (middle, y)]], colors=MLSTM_COLOUR, linewidths=2.4)
        )

    if share < 1.0:
        axes.add_collection(
            LineCollection(
                [[(middle, y), (x + width, y)]],
                colors=SLSTM_COLOUR,
                linewidths=2.4,
                linestyles=[(0, (0.7, 0.7))],
            )
        )


def _describe(summary: LayerSummary) -> str:
    parts = []

    if summary.mlstm_share is not None:
        parts.append(f"weight of mLSTM experts {summary.mlstm_share:.0%}")
    if summary.difficulty is not None:
        parts.append(f"mean difficulty {summary.difficulty:.3f}")

    parts.append(f"mean entropy {summary.entropy:.3f}")

    return ", ".join(parts)


def _draw_able(text: str) -> str:
    return "".join(c if c in "\n\t" or ord(c) in _glyphs() else "□" for c in text)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(_FONT)).get_charmap())
