"""Fixtures of the tests of `moxe_plugin.nn`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moxe_plugin.nn.native import products
from moxe_plugin.nn.native.processor import multiplies_pairs


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()

    yield

    torch.set_num_threads(num_threads)


@pytest.fixture(params=["pairs", "floats"])
def _in_pairs_or_floats(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiply bfloat16 in either way, whichever is the faster one here."""
    in_pairs = request.param == "pairs"
    if in_pairs and not multiplies_pairs():
        pytest.skip("the processor multiplies no pairs of bfloat16")

    monkeypatch.setattr(products, "widens_bfloat16", lambda: not in_pairs)
