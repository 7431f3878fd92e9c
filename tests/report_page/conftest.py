"""A report of made-up runs: no number in here was ever measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moxe_plugin.report.content import Report, build_report
from moxe_plugin.report.paper import read_paper
from moxe_plugin.report.records import DamagedRun
from tests.report.synthetic import make_guess, make_trained
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored
from tests.report.test_paper import RESULTS

HOSTILE = "<img src=x onerror=hacked=1>'\"</script>{{7*7}}"

# By difficulty of the words: gemma2 is far behind, xlstm and moxe are alike.
_NATS = {"moxe": 5.0, "moxe_gamma0": 5.4, "xlstm": 4.99, "gemma2": 9.5}

# As text the last one would come first.
_SPEEDS = {"moxe": 987.0, "moxe_gamma0": 98.0, "xlstm": 9.8, "gemma2": 1234.0}


@pytest.fixture(scope="session")
def report() -> Report:
    """Make a comparison of three seeds with items, and one of a single seed."""
    words = np.random.default_rng(0).normal(0.0, 1.0, size=200)
    noise = np.random.default_rng(1)

    records = [
        make_scored(
            system,
            seed,
            nats + words + noise.normal(0.0, 0.05, size=200),
            suite="small",
            loss=nats + seed / 100,
            throughput_tokens_per_s=_SPEEDS[system],
            training_tokens=819200,
        )
        for system, nats in _NATS.items()
        for seed in (1, 2, 3)
    ]
    guess = make_guess()
    guess = replace(
        guess,
        environment=replace(guess.environment, suite="small"),
        items={LAMBADA: make_lambada(np.full(200, 8.0))},
    )

    single = [
        make_trained("moxe", loss=4.5, label=HOSTILE),
        make_trained("xlstm", loss=4.25),
    ]

    return build_report(
        [*records, guess, *single],
        [DamagedRun(name="broken_<b>run</b>", reason="train.jsonl: a value is NaN.")],
        paper=read_paper(RESULTS / "paper.json"),
    )
