"""Tables of what was measured, for CSV files, plots and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moxe_plugin.claims.evidence import Evidence, mean_by_seed, stack
from moxe_plugin.claims.judging import Judgement
from moxe_plugin.claims.measurements import RunMeasurement
from moxe_plugin.claims.metrics import (
    held_out_loss,
    word_accuracy,
    word_loss,
    word_token_loss,
)
from moxe_plugin.claims.systems import label_system
from moxe_plugin.report.statistics import MissingNumberError

_METRICS = {
    "held_out_loss_nats_per_token": held_out_loss,
    "lambada_loss_nats_per_word": word_loss,
    "lambada_loss_nats_per_token": word_token_loss,
    "lambada_accuracy": word_accuracy,
}


def verdict_table(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """List every answer.

    :param judgements: The judged claims.

    :returns: One row a question.
    """
    rows = []

    for judgement in judgements:
        for answer in judgement.answers:
            question, estimate = answer.question, answer.estimate

            rows.append(
                {
                    "claim": judgement.claim.key,
                    "number": question.text,
                    "unit": question.unit,
                    "value": estimate and estimate.value,
                    "low": estimate and estimate.low,
                    "high": estimate and estimate.high,
                    "standard_error": estimate and estimate.standard_error,
                    "degrees_of_freedom": estimate and estimate.degrees_of_freedom,
                    "claimed": f"{question.direction} {question.bound:g}",
                    "p_value_holm": answer.p_value,
                    "verdict": answer.verdict,
                    "missing": answer.missing,
                    "claim_verdict": judgement.verdict,
                }
            )

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def system_table(evidence: Evidence) -> pd.DataFrame:
    """List the systems with their losses, and two guesses.

    :param evidence: The measured runs.

    :returns: One row a system: mean and standard deviation over seeds of each loss; its
        perplexity is the exponential of the mean.
    """
    rows = [_system_row(evidence, system) for system in evidence.systems]

    reference = evidence.runs(evidence.systems[0])[0]
    rows += [_guess_row(reference, "unigram"), _guess_row(reference, "uniform")]

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def _system_row(evidence: Evidence, system: str) -> dict[str, Any]:
    runs = evidence.runs(system)

    row: dict[str, Any] = {
        "system": system,
        "label": label_system(system),
        "seeds": " ".join(str(run.seed) for run in runs),
        "num_parameters": runs[0].model["num_parameters"],
        "num_active_parameters": runs[0].model["num_active_parameters"],
        "forward_mflops_per_token": runs[0].model["forward_flops_per_token"] / 1e6,
    }

    for name, metric in _METRICS.items():
        try:
            values = mean_by_seed(stack(runs, metric))
        except MissingNumberError:
            continue

        row[name] = float(values.mean())
        row[f"{name}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None

    return row


def _guess_row(run: RunMeasurement, guess: str) -> dict[str, Any]:
    uniform = math.log(run.setting["vocab_size"])

    def total(texts: Mapping[str, Sequence[float]]) -> float:
        if guess == "unigram":
            return float(np.sum(texts["unigram_nll"]))

        return float(np.sum(texts["num_tokens"])) * uniform

    tokens = float(np.sum(run.documents["num_tokens"]))
    row: dict[str, Any] = {
        "system": guess,
        "label": f"{guess} guess",
        "held_out_loss_nats_per_token": total(run.documents) / tokens,
    }

    if (passages := run.passages) is not None:
        row["lambada_loss_nats_per_word"] = total(passages) / len(passages["nll"])
        row["lambada_loss_nats_per_token"] = total(passages) / float(
            np.sum(passages["num_tokens"])
        )

    return row


def rarity_table(evidence: Evidence) -> pd.DataFrame:
    """List by tenth of rarity where tokens go.

    :param evidence: The measured runs.

    :returns: One row a system, seed, layer and tenth (0 is the most frequent): means
        over the tokens of all documents.
    """
    rows = []

    for run, layer, measures in _walk_layers(evidence):
        sums = {
            name.removeprefix("bin_"): np.sum(values, axis=0)
            for name, values in measures.items()
            if name.startswith("bin_")
        }
        tokens = sums.pop("num_tokens")

        rows += [
            {
                "system": run.system,
                "seed": run.seed,
                "layer": layer,
                "rarity_tenth": rarity_bin,
                "num_tokens": int(num_tokens),
                **{n: v[rarity_bin] / num_tokens for n, v in sums.items()},
            }
            for rarity_bin, num_tokens in enumerate(tokens)
            if num_tokens > 0
        ]

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def odds_table(evidence: Evidence) -> pd.DataFrame:
    """List the log odds of the groups by the bias.

    :param evidence: The measured runs.

    :returns: One row a system, seed, layer and bin of difficulty: means of
        ``2 gamma d`` and of ``ln(P_m/P_s)`` over the tokens of all documents.
    """
    rows = []

    for run, layer, measures in _walk_layers(evidence):
        if "curve_x" not in measures:
            continue

        tokens, x, y = (
            np.sum(measures[name], axis=0)
            for name in ("curve_num_tokens", "curve_x", "curve_y")
        )
        rows += [
            {
                "system": run.system,
                "seed": run.seed,
                "layer": layer,
                "num_tokens": int(n),
                "bias": x_sum / n,
                "log_odds": y_sum / n,
            }
            for n, x_sum, y_sum in zip(tokens, x, y, strict=True)
            if n > 0
        ]

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def share_table(evidence: Evidence) -> pd.DataFrame:
    """List the mLSTM group's share of places over training.

    :param evidence: The measured runs.

    :returns: One row a system, seed, layer and published step: the share over the
        interval before it.
    """
    rows = []

    for run, layer, _ in _walk_layers(evidence):
        shares = run.training[f"layer_{layer}/mlstm_share"]

        rows += [
            {
                "system": run.system,
                "seed": run.seed,
                "layer": layer,
                "training_tokens": int(tokens),
                "mlstm_share": share,
            }
            for tokens, share in zip(run.training["tokens"], shares, strict=True)
        ]

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def time_table(times: Mapping[str, Any]) -> pd.DataFrame:
    """List times of forward passes.

    :param times: As :func:`~moxe_plugin.claims.timing.time_runs` returns them.

    :returns: One row a system and length: the fastest and the median round, in
        microseconds per token.
    """
    rows = []

    for system, seconds in times["seconds"].items():
        for length, column in zip(
            times["lengths"], zip(*seconds, strict=True), strict=True
        ):
            micros = np.asarray(column) / length * 1e6
            rows.append(
                {
                    "system": system,
                    "label": label_system(system),
                    "length": length,
                    "min_us_per_token": float(micros.min()),
                    "median_us_per_token": float(np.median(micros)),
                }
            )

    frame: pd.DataFrame = pd.DataFrame(rows)

    return frame


def _walk_layers(
    evidence: Evidence,
) -> list[tuple[RunMeasurement, int, Mapping[str, Sequence[Any]]]]:
    return [
        (run, layer, measures)
        for system in evidence.systems
        for run in evidence.runs(system)
        for layer, measures in enumerate(run.layers)
    ]
