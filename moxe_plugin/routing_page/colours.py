"""One scale of colours for page, image and terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

NUM_STEPS: Final = 10

MLSTM_COLOUR: Final = "#d55e00"
SLSTM_COLOUR: Final = "#0072b2"

_DARKEST: Final = 0.85


class Step(NamedTuple):
    """A step of the scale."""

    fill: str
    """The colour of the field."""

    ink: str
    """Black or white: what is read more easily on it."""


SCALE_ENDS: Final = (0.05, 0.95)
"""The shares of tokens, in the order of their values, where a scale begins and ends."""


class Colouring(NamedTuple):
    """A quantity that tokens are coloured by."""

    key: str
    """Its name in code."""

    label: str
    """Its name for readers, with the unit."""

    values: Sequence[Tensor]
    """The value of each token in each layer. *Shape of each:* ``(S)``."""

    low: float
    """Where the scale begins: at the 5th percentile of all layers, since a few tokens
    far from all others would take the colours from them."""

    high: float
    """Where the scale ends: at the 95th percentile."""


def scale_steps() -> list[Step]:
    """Return the steps of the scale, from low to high.

    ColorBrewer's YlGnBu, whose lightness alone tells steps apart, so that colour-blind
    readers see it too; without its darkest part, which would weigh on the text.

    :returns: ``NUM_STEPS`` steps, from light to dark.
    """
    colours = colormaps["YlGnBu"]

    steps = []
    for idx in range(NUM_STEPS):
        rgb = colours(_DARKEST * idx / (NUM_STEPS - 1))[:3]
        steps.append(Step(to_hex(rgb), "#000000" if _is_light(rgb) else "#ffffff"))

    return steps


def step_of(value: float, low: float, high: float) -> int:
    """Find the step of a value.

    :param value: The value.
    :param low: Where the scale begins.
    :param high: Where it ends.

    :returns: The step; the first one if the scale has no length.
    """
    if high <= low:
        return 0

    step = int((value - low) / (high - low) * NUM_STEPS)

    return min(max(step, 0), NUM_STEPS - 1)


def find_scale(values: Sequence[Tensor]) -> tuple[float, float]:
    """Find where the scale of a quantity begins and ends.

    :param values: The values of each layer. *Shape of each:* ``(S)``.

    :returns: Two of the values.
    """
    everything = torch.cat(list(values)).sort().values
    last = everything.numel() - 1

    # The nearest token's value, as the page's script computes it.
    low, high = (everything[round(share * last)] for share in SCALE_ENDS)

    return float(low), float(high)


def _is_light(rgb: tuple[float, ...]) -> bool:
    # Relative luminance of WCAG 2; at 0.179 black and white contrast equally.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    red, green, blue = linear

    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179
