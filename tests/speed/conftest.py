"""Fixtures of the tests of measurements."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    # Every measurement collects garbage. What a process of many tests has imported and
    # made before, seconds at a time, is left out; also later, as what has been imported
    # stays.
    gc.freeze()
