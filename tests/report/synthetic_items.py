"""Items made up for tests: no number in here was ever measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moxe_plugin.report.items import TaskItems
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.statistics import Array
from tests.report.synthetic import make_trained

LAMBADA = "moxe_lambada"


def make_lambada(nll: Array, *, first: int = 0) -> TaskItems:
    """Two tokens a word; a word of less than a nat is greedy."""
    return TaskItems(
        items=tuple(f"{first + idx:012x}" for idx in range(len(nll))),
        columns={
            "logprob": tuple(-nll),
            "num_tokens": (2.0,) * len(nll),
            "is_greedy": tuple((nll < 1.0).astype(float)),
        },
    )


def make_scored(system: str, seed: int, nll: Array, **changes: object) -> RunRecord:
    """Make a run with LAMBADA's words and what the harness says of them."""
    record = make_trained(system, seed, **changes)  # type: ignore[arg-type]

    results = {
        LAMBADA: {
            "perplexity,none": float(np.exp(nll.mean())),
            "acc,none": float((nll < 1.0).mean()),
        }
    }

    return replace(
        record,
        evals={**record.evals, "pretrained": {"results": results}},
        items={LAMBADA: make_lambada(nll)},
    )
