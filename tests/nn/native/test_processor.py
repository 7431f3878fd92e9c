"""Tests of `moxe_plugin.nn.native.processor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe_plugin.nn.native import processor
from moxe_plugin.nn.native.processor import find_vendor


def test_the_vendor_is_that_of_the_first_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "Path", lambda _: path)
    assert find_vendor() is None

    path.write_text("processor\t: 0\nBogoMIPS\t: 50.0\n")
    assert find_vendor() is None

    path.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n")
    assert find_vendor() == "GenuineIntel"
