"""Tests of `moxe_plugin.speed.clock`."""

from __future__ import annotations

import gc

import pytest
import torch

from moxe_plugin.speed.clock import time_repeats


def test_no_garbage_is_looked_for_while_a_call_is_timed() -> None:
    seen: list[bool] = []

    seconds = time_repeats(lambda: seen.append(gc.isenabled()), 3, torch.device("cpu"))

    assert seen == [False, False, False]
    assert len(seconds) == 3
    assert gc.isenabled()


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_looked_for_as_before_after_a_failing_call(is_enabled: bool) -> None:
    def fail() -> None:
        raise RuntimeError("failed")

    gc.enable() if is_enabled else gc.disable()

    try:
        with pytest.raises(RuntimeError, match="failed"):
            time_repeats(fail, 1, torch.device("cpu"))

        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
