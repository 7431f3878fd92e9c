"""The routing of a text on a terminal."""

from __future__ import annotations

from typing import Final

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moxe_plugin.routing_page.colours import (
    MLSTM_COLOUR,
    NUM_STEPS,
    SLSTM_COLOUR,
    scale_steps,
    step_of,
)
from moxe_plugin.routing_page.pieces import Placed, lay_out
from moxe_plugin.routing_page.view import GROUP_NAMES, RoutingView

_SIGNS: Final = {"m": "m", "s": "s", "ms": "+", "": " "}
_STYLES: Final = {
    "m": f"bold {MLSTM_COLOUR}",
    "s": f"bold {SLSTM_COLOUR}",
    "ms": "bold",
    "": "",
}


def print_view(view: RoutingView, layer_idx: int, console: Console) -> None:
    """Print the text with a layer's routing, and a line for each layer.

    Below each token stand the sign of its group and its step on the scale of colours,
    so that nothing is lost without colours.

    :param view: What to show.
    :param layer_idx: The layer of the text.
    :param console: The terminal.
    """
    layer = view.trace.layers[layer_idx]
    colouring = view.colourings()[0]
    values = colouring.values[layer_idx].tolist()
    steps = [step_of(value, colouring.low, colouring.high) for value in values]
    marks = view.marks(layer)

    _print_heading(view, layer_idx, console)

    for line in lay_out(view.pieces, console.width, cell_len):
        for row in _draw_line(line, steps, marks):
            console.print(row, no_wrap=True, overflow="ignore", crop=False)

    _print_summary(view, console)


def _print_heading(view: RoutingView, layer_idx: int, console: Console) -> None:
    colouring = view.colourings()[0]

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    say(f"{view.title}, layer {layer_idx} of {len(view.trace.layers)} (from 0)")
    for note in view.notes:
        say(note)
    if view.source:
        say(view.source)

    present = {mark for layer in view.trace.layers for mark in view.marks(layer)}
    signs = [f"{_SIGNS[m]} {n}" for m, n in GROUP_NAMES.items() if m in present]
    digits = (
        f"0-{NUM_STEPS - 1} {colouring.label}, {colouring.low:.2f} or less to "
        f"{colouring.high:.2f} or more"
    )
    say("; ".join([*signs, digits]))
    say("")


def _draw_line(line: list[Placed], steps: list[int], marks: list[str]) -> list[Text]:
    scale = scale_steps()
    words, signs, digits = Text(), Text(), Text()

    for token in line:
        step = steps[token.idx]
        mark = marks[token.idx]

        words.append(token.text, style=f"{scale[step].ink} on {scale[step].fill}")

        # Below the first letter of a word, not below the space before it.
        indent = int(token.text.startswith(" ") and token.width > 1)
        rest = token.width - indent - 1

        signs.append(" " * indent + _SIGNS[mark], style=_STYLES[mark])
        signs.append(" " * rest)
        digits.append(" " * indent + str(step) + " " * rest, style="dim")

    rows = [words, digits]
    if any(marks[token.idx] for token in line):
        rows.insert(1, signs)

    for row in rows[1:]:
        row.rstrip()

    return rows


def _print_summary(view: RoutingView, console: Console) -> None:
    summaries = [view.summarize(layer) for layer in view.trace.layers]

    table = Table(box=SIMPLE, padding=0, show_edge=False)
    table.add_column("layer", justify="right")

    columns = {"entropy": [f"{s.entropy:.3f}" for s in summaries]}
    if summaries[0].difficulty is not None:
        columns = {"difficulty": [f"{s.difficulty:.3f}" for s in summaries]} | columns
    if summaries[0].mlstm_share is not None:
        shares = {
            f"{_SIGNS[mark]} tokens": [
                f"{s.group_shares.get(mark, 0.0):.0%}" for s in summaries
            ]
            for mark in GROUP_NAMES
        }
        weights = {"mLSTM weight": [f"{s.mlstm_share:.0%}" for s in summaries]}
        columns = weights | shares | columns

    for name in columns:
        table.add_column(name, justify="right")
    for idx in range(len(summaries)):
        table.add_row(str(idx), *(column[idx] for column in columns.values()))

    console.print()
    console.print(table)

    loss = float(view.trace.nll_nats.mean())
    console.print(f"mean loss {loss:.4f} nats per token", highlight=False)
