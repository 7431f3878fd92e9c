"""Fixtures of the tests of `moxe_plugin.nn`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()

    yield

    torch.set_num_threads(num_threads)
