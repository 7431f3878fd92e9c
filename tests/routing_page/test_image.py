"""Tests of moxe_plugin/routing_page/image.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from moxe_plugin.routing_page.colours import (
    MLSTM_COLOUR,
    NUM_STEPS,
    SLSTM_COLOUR,
    scale_steps,
    step_of,
)
from moxe_plugin.routing_page.image import MAX_TOKENS, draw_image
from tests.routing_page.conftest import HOSTILE_TEXT, Read


def _count_pixels(file: Path, colour: str) -> int:
    pixels = imread(file)[..., :3]

    return int((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 2e-3).sum())


def test_the_image_shows_colours_and_marks(read: Read, tmp_path: Path) -> None:
    view = read("A text of some words, with a few digits: 12345.")
    draw_image(view, tmp_path / "a.png")

    # The legend alone has fewer of each.
    for step in scale_steps():
        assert _count_pixels(tmp_path / "a.png", step.fill) > 800
    for colour in (MLSTM_COLOUR, SLSTM_COLOUR):
        assert _count_pixels(tmp_path / "a.png", colour) > 500


def test_the_image_without_groups_has_no_marks(read: Read, tmp_path: Path) -> None:
    draw_image(read("A text.", "tiny_ffn"), tmp_path / "a.png")

    for colour in (MLSTM_COLOUR, SLSTM_COLOUR):
        assert _count_pixels(tmp_path / "a.png", colour) == 0


def test_odd_characters_are_drawn_without_warnings(read: Read, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_image(read(HOSTILE_TEXT), tmp_path / "a.png")


def test_the_image_of_a_long_text_ends(read: Read, tmp_path: Path) -> None:
    for name, length in (("a", MAX_TOKENS), ("b", 2 * MAX_TOKENS)):
        draw_image(read("x" * length), tmp_path / f"{name}.png")

    short, long = (imread(tmp_path / f"{name}.png").shape for name in "ab")

    # The same text of two layers; the caption of the second may take a line more.
    assert short[0] <= long[0] < short[0] + 60


def test_the_same_view_gives_the_same_image(read: Read, tmp_path: Path) -> None:
    for name in "ab":
        draw_image(read("A text."), tmp_path / f"{name}.png")

    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_steps_divide_the_scale_evenly_and_hold_its_ends() -> None:
    values = [-1.0, 0.0, 0.099, 0.1, 0.5, 0.999, 1.0, 2.0]

    steps = [step_of(value, 0.0, 1.0) for value in values]

    last = NUM_STEPS - 1
    assert steps == [0, 0, 0, 1, NUM_STEPS // 2, last, last, last]
    assert step_of(0.5, 0.5, 0.5) == 0


def test_ink_is_read_easily_on_every_step() -> None:
    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in to_rgb(colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    fills = []
    for step in scale_steps():
        fill, ink = luminance(step.fill), luminance(step.ink)
        # The minimum of WCAG 2 for text, level AA.
        assert (max(fill, ink) + 0.05) / (min(fill, ink) + 0.05) >= 4.5
        fills.append(fill)

    assert fills == sorted(fills, reverse=True)
