"""What can be read off a measured run: numerators and denominators by document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moxe_plugin.claims.measurements import RunMeasurement
from moxe_plugin.report.statistics import MissingNumberError

Metric = Callable[[RunMeasurement], tuple[Sequence[float], Sequence[float]]]
"""Reads numerators and denominators, one a document, off a run; raises
:class:`~moxe_plugin.report.statistics.MissingNumberError` if the run has none."""


def held_out_loss(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
    """Read the loss on the held-out documents, in nats per token.

    :param run: The run.

    :returns: Nats and tokens by document.
    """
    return run.documents["nll"], run.documents["num_tokens"]


def word_loss(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
    """Read the loss of LAMBADA's last words, in nats per word.

    Its exponential is lm-evaluation-harness' perplexity.

    :param run: The run.

    :returns: Nats and words by passage.

    :raises MissingNumberError: LAMBADA was not measured.
    """
    passages = _passages(run)

    return passages["nll"], [1.0] * len(passages["nll"])


def word_token_loss(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
    """Read the loss of LAMBADA's last words, in nats per token.

    :param run: The run.

    :returns: Nats and tokens by passage.

    :raises MissingNumberError: LAMBADA was not measured.
    """
    passages = _passages(run)

    return passages["nll"], passages["num_tokens"]


def word_accuracy(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
    """Read the share of LAMBADA's last words that are the greedy continuation.

    :param run: The run.

    :returns: Hits and words by passage.

    :raises MissingNumberError: LAMBADA was not measured.
    """
    passages = _passages(run)

    return passages["is_greedy"], [1.0] * len(passages["nll"])


def correlation(name: str, layer: int) -> Metric:
    """Make the metric of a rank correlation: the mean over documents.

    :param name: The measure, ``rho_*``.
    :param layer: The layer.

    :returns: The metric.
    """

    def read(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
        values = _layer_measure(run, layer, name)

        # A constant has no correlation.
        return [v or 0.0 for v in values], [float(v is not None) for v in values]

    return read


def layer_ratio(
    numerator: str, denominator: str, layer: int, *, rarity_bin: int | None = None
) -> Metric:
    """Make the metric of a ratio of two measures of a layer.

    :param numerator: The measure above the line.
    :param denominator: The measure below the line.
    :param layer: The layer.
    :param rarity_bin: Which bin, if the measures are by bin of rarity.

    :returns: The metric.
    """

    def read_one(run: RunMeasurement, name: str) -> list[float]:
        values = _layer_measure(run, layer, name)

        return [v if rarity_bin is None else v[rarity_bin] for v in values]

    def read(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
        return read_one(run, numerator), read_one(run, denominator)

    return read


def explained_odds(layer: int) -> Metric:
    """Make the metric of how much of the log odds' variance the bias alone explains.

    ``1 - sum r r / sum y y`` with ``y = 2 gamma d + r``, within documents: 1 if the
    odds before the bias are the same for each token; negative if they vary more than
    the odds after it.

    :param layer: The layer.

    :returns: The metric.
    """

    def read(run: RunMeasurement) -> tuple[Sequence[float], Sequence[float]]:
        total = _layer_measure(run, layer, "odds_yy")
        rest = _layer_measure(run, layer, "odds_rr")

        return [t - r for t, r in zip(total, rest, strict=True)], total

    return read


def _passages(run: RunMeasurement) -> Mapping[str, Sequence[float]]:
    if run.passages is None:
        raise MissingNumberError("LAMBADA was not measured (`--lambada`)")

    return run.passages


def _layer_measure(run: RunMeasurement, layer: int, name: str) -> Sequence[Any]:
    if layer >= len(run.layers) or name not in run.layers[layer]:
        raise MissingNumberError(f"the router of {run.file_name} has no `{name}`")

    return run.layers[layer][name]
