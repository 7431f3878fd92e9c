"""Numbers of systems from measured runs, ready to be compared by seed and document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moxe_plugin.claims.measurements import RunMeasurement
from moxe_plugin.claims.metrics import Metric
from moxe_plugin.claims.systems import LABELS, label_system
from moxe_plugin.report.statistics import (
    Array,
    Estimate,
    MissingNumberError,
    Ratio,
    estimate_ratios,
)


class Evidence:
    """Measured runs by system and seed.

    :param measurements: The runs; they must be comparable.
    """

    def __init__(self, measurements: Iterable[RunMeasurement]) -> None:
        self._runs: dict[str, dict[int, RunMeasurement]] = {}

        for run in measurements:
            self._runs.setdefault(run.system, {})[run.seed] = run

    @property
    def systems(self) -> list[str]:
        """The measured systems, in the order of pages."""
        known = [name for name in LABELS if name in self._runs]

        return known + sorted(self._runs.keys() - LABELS.keys())

    def runs(self, system: str) -> list[RunMeasurement]:
        """List the runs of a system.

        :param system: Its name.

        :returns: The runs by seed; none if the system was not measured.
        """
        runs = self._runs.get(system, {})

        return [runs[seed] for seed in sorted(runs)]

    def num_layers(self, system: str) -> int:
        """Count the layers whose routing was measured.

        :param system: Its name.

        :returns: The number; 0 if the system was not measured.
        """
        return max((len(run.layers) for run in self.runs(system)), default=0)

    def estimate(self, *terms: Term) -> Estimate:
        """Estimate a weighted sum of metrics of systems.

        Only seeds that all systems have enter, so that runs on the same order of
        training text are compared.

        :param terms: What to sum.

        :returns: The estimate.

        :raises MissingNumberError: A system was not measured, the systems have fewer
            than two seeds in common, or their runs lack a number.
        """
        for term in terms:
            if term.system not in self._runs:
                raise MissingNumberError(
                    f"no run of {label_system(term.system)} was measured"
                )

        seeds = sorted(set.intersection(*(set(self._runs[t.system]) for t in terms)))

        if not seeds:
            raise MissingNumberError("the systems have no seed in common")

        return estimate_ratios(
            [
                (
                    term.coefficient,
                    stack(
                        [self._runs[term.system][seed] for seed in seeds], term.metric
                    ),
                )
                for term in terms
            ]
        )


class Term(NamedTuple):
    """A summand."""

    coefficient: float
    system: str
    metric: Metric


def difference(metric: Metric, system: str, other: str) -> tuple[Term, Term]:
    """Subtract a metric of one system from that of another.

    :param metric: The metric.
    :param system: The system.
    :param other: The system to subtract.

    :returns: The terms of the difference.
    """
    return Term(1.0, system, metric), Term(-1.0, other, metric)


def stack(runs: Sequence[RunMeasurement], metric: Metric) -> Ratio:
    """Read a metric off the runs of a system.

    :param runs: One run a seed.
    :param metric: The metric.

    :returns: The ratio over seeds and documents.
    """
    pairs = [metric(run) for run in runs]

    return Ratio(
        *(np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    )


def mean_by_seed(ratio: Ratio) -> Array:
    """Compute the value of each seed.

    :param ratio: The ratio.

    :returns: *Shape:* ``(num_seeds)``.
    """
    value: Array = ratio.numerators.sum(axis=1) / ratio.denominators.sum(axis=1)

    return value
