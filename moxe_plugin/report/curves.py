"""Metrics over training: the mean over seeds, from the lowest to the highest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd

from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.rows import Row
from moxe_plugin.report.statistics import Array

Split = Literal["train", "valid"]

_LAYER_METRIC: Final = re.compile(r"layer_(\d+)/(\w+)")


class Curve(NamedTuple):
    """A metric of a row over training."""

    row: Row
    tokens: Array
    """Training tokens seen. *Shape:* ``(P)``."""

    mean: Array
    """Over the seeds. *Shape:* ``(P)``."""

    low: Array
    """The lowest seed. *Shape:* ``(P)``."""

    high: Array
    """The highest seed. *Shape:* ``(P)``."""


def read_curves(rows: Iterable[Row], split: Split, metric: str) -> list[Curve]:
    """Read a metric of pretraining.

    Only points that all seeds of a row have count, so that a mean is always over the
    same seeds.

    :param rows: The rows.
    :param split: Which file of metrics.
    :param metric: fairseq2's display name of the metric.

    :returns: One curve for each row that has the metric.
    """
    curves = []

    for row in rows:
        frame = pd.DataFrame(
            {
                number: _read_series(record, split, metric)
                for number, record in enumerate(row.records)
            }
        ).dropna()

        if frame.empty:
            continue

        values = frame.sort_index()
        curves.append(
            Curve(
                row,
                values.index.to_numpy(dtype=np.float64),
                values.mean(axis=1).to_numpy(),
                values.min(axis=1).to_numpy(),
                values.max(axis=1).to_numpy(),
            )
        )

    return curves


def list_layers(rows: Iterable[Row], metric: str) -> list[int]:
    """List the layers that a metric of routing was recorded for.

    :param rows: The rows.
    :param metric: The metric's name within its layer.

    :returns: The layers, sorted.
    """
    layers = {
        int(match[1])
        for row in rows
        for record in row.records
        for line in record.train[:1]
        for key in line
        if (match := _LAYER_METRIC.fullmatch(key)) and match[2] == metric
    }

    return sorted(layers)


def _read_series(record: RunRecord, split: Split, metric: str) -> pd.Series[float]:
    lines = record.train if split == "train" else record.valid
    points = _read_points(lines, metric)

    last_step = max((step for step, _ in _read_points(record.train, "Step")), default=1)

    # Systems may take different numbers of steps for the same tokens.
    tokens_per_step = (record.environment.training_tokens or 0) / last_step

    return pd.Series(
        [value for _, value in points],
        index=[round(step * tokens_per_step) for step, _ in points],
        dtype="float64",
    )


def _read_points(
    lines: Sequence[Mapping[str, Any]], metric: str
) -> list[tuple[int, float]]:
    # A run that was resumed may have a step twice; the later line is the one that
    # the model went on from.
    points = {
        int(line["Step"]): float(line[metric])
        for line in lines
        if line.get("Stage") == "pretrain" and metric in line and "Step" in line
    }

    return sorted(points.items())
