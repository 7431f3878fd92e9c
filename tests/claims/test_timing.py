"""Times take turns, and exponents are slopes."""

from __future__ import annotations

from functools import partial

import pytest

from moxe_plugin.claims.timing import time_calls, time_exponents
from moxe_plugin.console import Stages


def test_systems_take_turns_within_a_length() -> None:
    calls: list[tuple[str, int]] = []

    seconds = time_calls(
        {name: partial(_note, calls, name) for name in ("a", "b")},
        [4, 8],
        2,
        stage=Stages().start("rounds"),
    )

    one_round = [("a", 4), ("b", 4), ("a", 8), ("b", 8)]
    # The first round warms up.
    assert calls == one_round * 3
    assert {name: [len(row) for row in rows] for name, rows in seconds.items()} == {
        "a": [2, 2],
        "b": [2, 2],
    }
    assert all(s >= 0 for rows in seconds.values() for row in rows for s in row)


def _note(calls: list[tuple[str, int]], name: str, length: int) -> None:
    calls.append((name, length))


def test_exponent_is_the_power_of_the_length() -> None:
    lengths = [256, 512, 1024]
    linear = [3e-5 * n for n in lengths]
    quadratic = [1e-8 * n**2 for n in lengths]

    assert time_exponents([linear, quadratic], lengths) == pytest.approx([1.0, 2.0])
