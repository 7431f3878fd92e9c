"""Fixtures of the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def wide_sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the interpreter, slow for each program, add up partial sums in few.

    :param monkeypatch: Widens what a program takes; not for the tests of ``partials``.

    :yields: Nothing.
    """
    from moxe_plugin.nn.triton import partials
    from moxe_plugin.nn.triton.tile_products import is_interpreted

    if not is_interpreted():
        yield
        return

    monkeypatch.setattr(partials, "_WIDE", (16, 4096))
    partials._plan.cache_clear()

    yield

    partials._plan.cache_clear()
