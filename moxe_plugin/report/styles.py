"""How figures look: colours and marks of systems, and files that never change."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Final, NamedTuple

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from moxe_plugin.report.files import replacing, write_text

GUESS_COLOUR: Final = "#777777"

_POINTS_PER_INCH: Final = 72.0

# The width of a letter of a caption over the size of its font, rounded up.
_LETTER_WIDTH: Final = 0.58

_CAPTION_SIZE: Final = 8.0

# The span of an axis up to which there is room for ticks within a decade.
_MAX_FINE_SPAN: Final = 50.0


class SystemStyle(NamedTuple):
    """How a system is drawn everywhere."""

    colour: str
    marker: str
    dashes: str


# Okabe and Ito's palette, which colour-blind readers tell apart; systems that share a
# colour differ in marker and dashes.
_STYLES: Final = {
    "moxe": SystemStyle("#0072B2", "o", "-"),
    "xlstm": SystemStyle("#E69F00", "X", "-"),
    "gemma2": SystemStyle("#D55E00", "s", "-"),
    "qwen_moe": SystemStyle("#009E73", "^", "-"),
    "moxe_gamma0": SystemStyle("#009E73", "v", "--"),
    "moxe_standard": SystemStyle("#CC79A7", "D", "-"),
    "moxe_no_group_loss": SystemStyle("#D55E00", "P", "--"),
    "moxe_ffn": SystemStyle("#56B4E9", "<", "-"),
    "moxe_mlstm": SystemStyle("#E69F00", ">", "--"),
    "moxe_slstm": SystemStyle("#000000", "h", "-"),
    "moxe_token": SystemStyle("#0072B2", "p", ":"),
    "moxe_dense": SystemStyle("#000000", "*", ":"),
}

_OTHER_STYLES: Final = tuple(
    SystemStyle(colour, marker, dashes)
    for marker, dashes in (("d", "-."), ("8", ":"))
    for colour in ("#CC79A7", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#0072B2")
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnFigure:
    """A figure with its words."""

    name: str
    """The stem of its files."""

    title: str
    caption: str
    """What it shows, of which data, seeds and size; plain text."""

    figure: Figure


def system_style(system: str) -> SystemStyle:
    """Say how a system is drawn.

    :param system: Its name.

    :returns: The style; one that its name alone decides for systems that are not the
        paper's.
    """
    if system in _STYLES:
        return _STYLES[system]

    return _OTHER_STYLES[sum(system.encode()) % len(_OTHER_STYLES)]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save figures the same way whatever the user's settings are.

    :returns: A context for both.
    """
    with style.context("default"), mpl.rc_context({"svg.hashsalt": "moxe"}):
        yield


def create_figure(title: str, caption: str, *, width: float, height: float) -> Figure:
    """Create an empty figure with a title above and a caption below.

    :param title: The title.
    :param caption: The caption; lines are broken to fit.
    :param width: Inches.
    :param height: Inches.

    :returns: The figure.
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)

    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")

    num_letters = int(width * _POINTS_PER_INCH / (_CAPTION_SIZE * _LETTER_WIDTH))
    figure.supxlabel(
        fill(caption, num_letters),
        x=0.01,
        ha="left",
        fontsize=_CAPTION_SIZE,
        color="#444444",
    )

    return figure


def finish_figure(name: str, title: str, caption: str, figure: Figure) -> DrawnFigure:
    """Fix the places of everything, so that a figure is the same however often saved.

    :param name: The stem of its files.
    :param title: The title.
    :param caption: The caption.
    :param figure: The figure, complete.

    :returns: The figure with its words.
    """
    # The layout moves a little with each drawing.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")

    return DrawnFigure(name=name, title=title, caption=caption, figure=figure)


def style_axes(axes: Axes, *, grid: str = "both") -> None:
    """Take away what tells nothing, and add a faint grid.

    :param axes: The axes.
    :param grid: Which lines: ``x``, ``y`` or ``both``.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]  # a Literal there
    axes.set_axisbelow(True)


def tick_decades(axis: Axis, limits: tuple[float, float]) -> None:
    """Put ticks on a logarithmic axis, few enough to be read.

    :param axis: The axis.
    :param limits: Its ends.
    """
    low, high = limits
    steps = (1.0, 2.0, 5.0) if high / low < _MAX_FINE_SPAN else (1.0,)

    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(_shorten))
    axis.set_minor_locator(NullLocator())


def _shorten(number: float, _: int) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,g}{unit}"

    return f"{number:,g}"


def save_figure(drawn: DrawnFigure, directory: Path) -> list[Path]:
    """Write a figure as PNG and SVG; within :func:`drawing`.

    :param drawn: The figure.
    :param directory: Where the files go.

    :returns: The files.
    """
    png, svg = (directory / f"{drawn.name}.{suffix}" for suffix in ("png", "svg"))

    # Nothing that changes from call to call, or from version to version, goes in.
    with replacing(png) as part:
        drawn.figure.savefig(part, format="png", metadata={"Software": None})
    write_text(svg, svg_text(drawn))

    return [png, svg]


def svg_text(drawn: DrawnFigure) -> str:
    """Draw a figure as SVG; within :func:`drawing`.

    :param drawn: The figure.

    :returns: The document, without date or version.
    """
    buffer = io.StringIO()
    drawn.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})

    return buffer.getvalue()


def svg_without_words(drawn: DrawnFigure) -> str:
    """Draw a figure as SVG for a page that prints its title and caption as text.

    Within :func:`drawing`; the figure stays as it is.

    :param drawn: The figure.

    :returns: The document without title, caption and the margins they leave.
    """
    words = [text for text in drawn.figure.texts if text.get_visible()]
    buffer = io.StringIO()

    for text in words:
        text.set_visible(False)

    try:
        drawn.figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None},
            bbox_inches="tight",
        )
    finally:
        for text in words:
            text.set_visible(True)

    return buffer.getvalue()
