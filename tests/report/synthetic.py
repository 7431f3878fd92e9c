"""Run records made up for tests: no number in here was ever measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moxe_plugin.report.items import TaskItems
from moxe_plugin.report.records import (
    Code,
    Data,
    Environment,
    Hardware,
    ModelInfo,
    RunRecord,
)
from moxe_plugin.report.run_dirs import write_run

DATA = Data(
    name="embedded",
    tokenizer_sha256="a" * 64,
    vocab_size=2048,
    train_sha256="b" * 64,
    valid_sha256="c" * 64,
)


def make_trained(
    system: str = "moxe", seed: int = 2, loss: float = 4.0, **changes: Any
) -> RunRecord:
    environment = Environment(
        suite="quickstart",
        system=system,
        label=system.capitalize(),
        seed=seed,
        config_sha256=f"config-{system}-{seed}",
        recipe_sha256=f"recipe-{system}",
        hardware=Hardware(
            name="cpu2", device="cpu", model="Test CPU", num_threads=2, num_jobs=1
        ),
        code=Code(version="0.1.0", commit="0123abc", dirty=False),
        versions={"python": "3.11", "torch": "2.9.1"},
        data=DATA,
        training_tokens=40960,
        finetuning_tokens=8192,
        throughput_tokens_per_s=1234.4,
        peak_memory_gib=1.25,
        wall_s={"pretrain": 30.0, "finetune": 10.0, "evaluate": 5.5},
    )

    return RunRecord(
        name=f"{system}_embedded_cpu2_20261123_s{seed}",
        environment=replace(environment, **changes),
        model=ModelInfo(
            family=system,
            arch="quickstart",
            num_parameters=1900000,
            num_active_parameters=800000,
        ),
        train=[
            {"Stage": "pretrain", "Step": 10, "NLL Loss": loss + 2},
            {"Stage": "pretrain", "Step": 20, "NLL Loss": loss - 0.1},
            {"Stage": "finetune", "Step": 5, "NLL Loss": 1.0},
        ],
        valid=[
            {"Stage": "pretrain", "Step": 10, "Split": "valid", "NLL Loss": loss + 2.1},
            {"Stage": "pretrain", "Step": 20, "Split": "valid", "NLL Loss": loss},
            {"Stage": "finetune", "Step": 5, "Split": "valid", "NLL Loss": 1.5},
        ],
        evals={
            "pretrained": {
                "results": {
                    "moxe_embedded_rolling": {
                        "word_perplexity,none": 1500.2,
                        "bits_per_byte,none": 2.3456,
                    },
                    "moxe_embedded_last_word": {"acc,none": 0.5},
                }
            },
            "instructions": {
                "pretrained": {"nll_nats": loss + 0.5, "num_tokens": 100},
                "finetuned": {"nll_nats": loss - 1.0, "num_tokens": 100},
            },
        },
        items={
            "moxe_embedded_last_word": TaskItems(
                items=("0123456789ab", "ba9876543210"),
                columns={
                    "logprob": (-7.12345, -0.000123456),
                    "num_tokens": (3.0, 1.0),
                    "is_greedy": (0.0, 1.0),
                },
            )
        },
    )


def make_guess(system: str = "uniform", loss: float = 7.624619) -> RunRecord:
    trained = make_trained(system)

    return RunRecord(
        name=f"{system}_embedded_cpu2_20261123",
        environment=replace(
            trained.environment,
            kind="guess",
            label=f"{system} guess",
            seed=None,
            training_tokens=None,
            finetuning_tokens=None,
            throughput_tokens_per_s=None,
            peak_memory_gib=None,
            wall_s={},
        ),
        model=None,
        evals={
            "guess": {
                "valid_loss_nats": loss,
                "results": {"moxe_embedded_rolling": {"bits_per_byte,none": 3.5}},
            }
        },
    )


def write(results_dir: Path, *records: RunRecord) -> list[Path]:
    return [
        write_run(results_dir, record, "pretrain: {}\n" if record.model else None)
        for record in records
    ]
