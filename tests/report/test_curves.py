"""Metrics over training."""

from __future__ import annotations

from dataclasses import replace

from moxe_plugin.report.comparison import compare
from moxe_plugin.report.curves import list_layers, read_curves
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.rows import Row
from tests.report.synthetic import make_trained


def _row(*records: RunRecord) -> Row:
    (suite,) = compare(records, [])

    return suite.comparisons[0].rows[0]


def test_curve_is_the_mean_over_seeds_with_lowest_and_highest() -> None:
    row = _row(make_trained(seed=1, loss=4.0), make_trained(seed=2, loss=5.0))

    (curve,) = read_curves([row], "valid", "NLL Loss")

    # 40,960 tokens in 20 steps
    assert curve.tokens.tolist() == [20480.0, 40960.0]
    assert curve.low.tolist() == [6.1, 4.0]
    assert curve.high.tolist() == [7.1, 5.0]
    assert curve.mean.tolist() == [6.6, 4.5]


def test_point_that_a_seed_lacks_is_left_out() -> None:
    short = make_trained(seed=2)
    short = replace(short, valid=short.valid[1:])

    (curve,) = read_curves([_row(make_trained(seed=1), short)], "valid", "NLL Loss")

    assert curve.tokens.tolist() == [40960.0]


def test_step_that_was_repeated_after_a_kill_counts_once() -> None:
    record = make_trained()
    again = {**record.train[1], "NLL Loss": 3.5}
    row = _row(replace(record, train=[*record.train, again]))

    (curve,) = read_curves([row], "train", "NLL Loss")

    assert curve.mean.tolist() == [6.0, 3.5]


def test_row_without_the_metric_has_no_curve() -> None:
    assert read_curves([_row(make_trained())], "train", "Router Z Loss") == []


def test_layers_are_those_of_the_metric() -> None:
    record = make_trained()
    line = {
        **record.train[0],
        "layer_10/mlstm_share": 0.5,
        "layer_2/mlstm_share": 0.5,
        "layer_3/difficulty": 0.5,
    }

    assert list_layers([_row(replace(record, train=[line]))], "mlstm_share") == [2, 10]
