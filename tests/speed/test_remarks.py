"""What rows of a suite say together."""

from __future__ import annotations

from typing import Any

import pytest

from moxe_plugin.speed.records import SpeedRow
from moxe_plugin.speed.remarks import list_changes, list_remarks, moxe_ratio


def _row(family: str, tokens_per_s: float | None, **kwargs: Any) -> SpeedRow:
    values: dict[str, Any] = {
        **{"suite": "table1", "arch": "340m", "overrides": {}, "phase": "train"},
        **{"batch": 4, "length": 256, "optimizer": False, "device": "cpu"},
        **{"dtype": "float32", "repeats": 2, "warm_up": 1, "seed": 1},
        **kwargs,
    }

    return SpeedRow(family=family, tokens_per_s=tokens_per_s, **values)


def test_ratio_is_to_moxe_at_the_same_setting() -> None:
    moxe, longer, xlstm = (
        _row("moxe", 300.0),
        _row("moxe", 900.0, length=512),
        _row("xlstm", 200.0),
    )
    rows = [longer, moxe, xlstm, _row("moxe", 1.0, arch="340m_dense")]

    assert moxe_ratio(xlstm, rows) == pytest.approx(1.5)
    assert moxe_ratio(rows[3], rows) == pytest.approx(300.0)
    assert moxe_ratio(xlstm, [longer, xlstm]) is None
    assert moxe_ratio(_row("gemma2", None), rows) is None


def test_both_ratios_of_a_swapped_system_are_told() -> None:
    rows = [
        *(_row("moxe", 300.0), _row("moxe", 200.0, optimizer=True)),
        *(_row("gemma2", 100.0), _row("gemma2", 160.0, linear="swapped")),
        _row("gemma2", 80.0, optimizer=True),
        _row("gemma2", None, optimizer=True, linear="swapped"),
    ]

    assert list_remarks(rows) == [
        "`gemma2` `340m`, train, 4 x 256: MoxE is 3.00 times as fast as it is, and "
        "1.88 times as it is with our products."
    ]


def test_growth_over_experts_stands_beside_that_of_memory() -> None:
    def count(num: int, seconds: float, weights: float, gradients: float) -> SpeedRow:
        return _row(
            "moxe",
            1.0,
            **{"overrides": {"num_experts": num}, "seconds": seconds},
            **{"least_memory_seconds": weights, "new_gradient_seconds": gradients},
        )

    few, more, many = (
        *(count(8, 7.0, 0.06, 0.5), count(16, 8.0, 0.1, 1.0)),
        count(64, 15.5, 0.36, 7.0),
    )
    expected = [
        "8 to 64 experts, train, 4 x 256: a step takes 8.5 s more. Weights take at "
        "least 0.3 s more, gradients in new memory 6.5 s."
    ]

    assert list_remarks([few, more, many]) == expected
    assert list_remarks([many, few]) == expected
    assert not list_remarks([few])
    assert not list_remarks([few, _row("moxe", None, overrides={"num_experts": 64})])


def test_what_was_changed_is_named() -> None:
    assert not list_changes(_row("moxe", 1.0))
    assert list_changes(
        _row("moxe", 1.0, overrides={"num_experts": 8}, router_skew=0.5)
    ) == {"num_experts": 8, "router_skew": 0.5}
    assert list_changes(_row("gemma2", 1.0, linear="swapped")) == {"linear": "swapped"}
