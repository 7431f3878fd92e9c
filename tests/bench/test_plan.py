"""What a run is called: a hash of everything that its numbers depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moxe_plugin.bench.plan import Resolution, RunPlan, plan_suite
from moxe_plugin.bench.suite import Suite, System


def _plan(
    work_dir: Path, dataset_path: str = "/data/x", tasks: list[Any] | None = None
) -> dict[str, RunPlan]:
    suite = Suite(
        name="mine",
        data="embedded",
        seeds=[2],
        systems=[
            System(
                name="moxe",
                label="MoxE",
                pretrain="smoke",
                finetune="instruct/quickstart",
            ),
            System(name="xlstm", label="xLSTM", pretrain="smoke"),
        ],
        tasks=[],
    )
    config = {
        "regime": {"num_steps": 20},
        "common": {"seed": 2},
        "dataset": {"path": dataset_path},
        "tokenizer": {"name": None},
    }
    data = {"name": "embedded"}
    resolution = Resolution(
        configs={
            "moxe_s2": {"pretrain": config, "finetune": config},
            "xlstm_s2": {"pretrain": config},
        },
        data={"moxe_s2": data, "xlstm_s2": data},
        tasks=["moxe_embedded_rolling"] if tasks is None else tasks,
    )

    return {plan.system: plan for plan in plan_suite(suite, resolution, work_dir)}


def test_runs_of_plain_tasks_keep_the_names_of_earlier_versions() -> None:
    plans = _plan(Path("/work"))

    # As version 0.1 wrote them into records, which a repeated suite must find.
    assert [plans[name].config_sha256[:16] for name in ("uniform", "moxe")] == [
        "8eec7bed7fef24d4",
        "fbd5ce35fbf3c9d0",
    ]
    assert plans["moxe"].recipe_sha256[:16] == "7b023bfdaac6f13c"


def test_place_of_the_work_directory_does_not_matter() -> None:
    here = _plan(Path("/here"), "/here/data/text-1234/tokens")
    there = _plan(Path("/there"), "/there/data/text-1234/tokens")
    other = _plan(Path("/there"), "/there/data/text-5678/tokens")

    for name in ("uniform", "moxe"):
        assert here[name].config_sha256 == there[name].config_sha256
        assert here[name].config_sha256 != other[name].config_sha256


def test_content_of_a_task_file_matters_and_its_place_does_not() -> None:
    def plan(file: str, sha256: str) -> str:
        task = {"task": "moxe_lambada", "file": file, "file_sha256": sha256}

        return _plan(Path("/work"), tasks=[task])["moxe"].config_sha256

    assert plan("/a/lambada.jsonl", "1") == plan("/b/lambada.jsonl", "1")
    assert plan("/a/lambada.jsonl", "1") != plan("/a/lambada.jsonl", "2")


def test_only_finetuned_systems_run_the_tasks_of_finetuned_models() -> None:
    task = {"task": "moxe_gsm8k", "stage": "finetuned"}

    plans = _plan(Path("/work"), tasks=["moxe_lambada", task])

    assert plans["moxe"].stages[-1].config["tasks"] == ["moxe_lambada", task]
    assert plans["xlstm"].stages[-1].config["tasks"] == ["moxe_lambada"]
    assert plans["unigram"].stages[-1].config["tasks"] == ["moxe_lambada"]
