"""Fixtures of the tests of measurements."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _small_heap() -> Iterator[None]:
    # Every measurement collects garbage. What a process of many tests has imported and
    # made before, seconds at a time, is left out.
    gc.freeze()

    yield

    gc.unfreeze()
