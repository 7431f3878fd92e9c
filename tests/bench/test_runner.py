"""Suites are run once, continued after a kill, and never mixed up."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moxe_plugin.bench import runner
from moxe_plugin.bench.children import create_context
from moxe_plugin.bench.display import LineDisplay
from moxe_plugin.bench.machine import Jobs, plan_jobs
from moxe_plugin.bench.plan import Resolution, RunPlan, plan_suite
from moxe_plugin.bench.runner import FailedRun, Runner
from moxe_plugin.bench.suite import SuiteError, parse_suite
from moxe_plugin.bench.work_dir import (
    find_conflicts,
    lock_work_dir,
    remove_conflicts,
)
from moxe_plugin.report.run_dirs import find_run_dirs, read_run
from tests.bench import fake_stages

Run = Callable[..., tuple[list[FailedRun], str]]
"""Runs plans; returns what failed and what was shown."""

_SUITE = """
name: mine
data: embedded
seeds: [2]
systems:
  - {name: moxe, label: MoxE, pretrain: smoke, finetune: instruct/quickstart}
tasks: []
"""


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return create_context(["moxe_plugin.bench.children"])


def _plan(work_dir: Path, num_steps: int = 20, text: str = _SUITE) -> list[RunPlan]:
    suite = parse_suite(text, "mine.yaml")
    resolution = fake_stages.resolve(
        replace(suite, pretrain_config={"num_steps": num_steps})
    )

    return plan_suite(suite, Resolution(**resolution), work_dir)


@pytest.fixture
def run(context: ForkServerContext, tmp_path: Path) -> Run:
    def run(
        plans: list[RunPlan],
        train: Any = fake_stages.train,
        num_jobs: int = 1,
        devices: list[str | None] | None = None,
    ) -> tuple[list[FailedRun], str]:
        output = io.StringIO()

        suite_runner = Runner(
            "mine",
            tmp_path / "results",
            context=context,
            functions={
                "pretrain": train,
                "finetune": fake_stages.train,
                "evaluate": fake_stages.evaluate,
                "guess": fake_stages.guess,
            },
            display=LineDisplay(Console(file=output, width=200)),
            jobs=Jobs(num_jobs, 2, devices or [None] * num_jobs),
        )

        return suite_runner.run(plans), output.getvalue()

    return run


def test_suite_leaves_a_record_per_run_and_per_guess(run: Run, tmp_path: Path) -> None:
    failed, _ = run(_plan(tmp_path / "work"))

    assert failed == []

    records = [read_run(path) for path in find_run_dirs(tmp_path / "results")]
    by_system = {record.environment.system: record for record in records}

    assert sorted(by_system) == ["bigram", "moxe", "uniform", "unigram"]
    assert by_system["uniform"].environment.kind == "guess"

    record = by_system["moxe"]
    environment = record.environment

    assert record.name.startswith("moxe_embedded_cpu2_")
    assert record.name.endswith("_s2")
    assert environment.training_tokens == 2000
    # 2 x 1000 tokens in 2 x (0.5 + 1.5) s
    assert environment.throughput_tokens_per_s == 500.0
    assert sorted(environment.wall_s) == ["evaluate", "finetune", "pretrain"]
    assert environment.peak_memory_gib is not None
    assert 0 < environment.peak_memory_gib < 1
    assert [(x["Stage"], x["Step"]) for x in record.train] == [
        ("pretrain", 10),
        ("pretrain", 20),
        ("finetune", 10),
        ("finetune", 20),
    ]
    file = tmp_path / "results" / record.name / "items_last_word.csv"
    assert file.read_text().splitlines() == [
        *("item,logprob,num_tokens,is_greedy", "a,-1.25,1,0", "b,-2,2,1")
    ]


def test_finished_suite_is_not_run_again(run: Run, tmp_path: Path) -> None:
    plans = _plan(tmp_path / "work")
    run(plans)
    files = {p: p.read_bytes() for p in (tmp_path / "results").glob("*/*")}

    failed, output = run(plans)

    assert failed == []
    assert "recorded in moxe_embedded" in output
    assert {p: p.read_bytes() for p in (tmp_path / "results").glob("*/*")} == files
    for stage in ("pretrain", "finetune", "evaluate"):
        assert fake_stages.count_calls(tmp_path / "work" / "moxe_s2", stage) == 1


def test_killed_stage_is_continued_and_finished_ones_are_kept(
    run: Run, tmp_path: Path
) -> None:
    plans = _plan(tmp_path / "work")

    failed, output = run(plans, fake_stages.train_killed_once)

    assert [f.stage.name for f in failed] == ["pretrain"]
    assert "killed by signal 9" in output
    assert len(find_run_dirs(tmp_path / "results")) == 3

    failed, output = run(plans, fake_stages.train_killed_once)

    assert failed == []
    run_dir = tmp_path / "work" / "moxe_s2"
    assert fake_stages.count_calls(run_dir, "pretrain") == 2
    assert fake_stages.count_calls(run_dir, "finetune") == 1

    (record,) = (
        read_run(path)
        for path in find_run_dirs(tmp_path / "results")
        if path.name.startswith("moxe")
    )
    # Step 10 came twice, the second time on a line that the kill had begun.
    steps = [x["Step"] for x in record.train if x["Stage"] == "pretrain"]
    assert steps == [10, 20]


def test_done_stages_are_reused_when_a_later_one_failed(
    run: Run, tmp_path: Path
) -> None:
    plans = _plan(tmp_path / "work")
    run(plans)
    state_file = tmp_path / "work" / "moxe_s2" / "evaluate.json"
    state_file.unlink()
    for path in (tmp_path / "results").glob("moxe*/environment.json"):
        path.unlink()

    _, output = run(plans)

    assert "MoxE, seed 2: pretrain: done before" in output
    assert "MoxE, seed 2: finetune: done before" in output
    assert fake_stages.count_calls(tmp_path / "work" / "moxe_s2", "evaluate") == 2


def test_failed_run_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    plans = _plan(tmp_path / "work")

    # The guesses come first; a second system comes after the failing one.
    text = _SUITE.replace("tasks", "  - {name: b, label: B, pretrain: smoke}\ntasks")
    plans = _plan(tmp_path / "work", text=text)

    failed, output = run(plans, fake_stages.train_failing)

    assert [f.plan.system for f in failed] == ["moxe", "b"]
    assert "the pretrain of b_s2 went wrong" in failed[1].error.read_log_tail()
    assert "B, seed 2: pretrain failed. The process ended with exit code 1" in output


def test_runs_share_the_machine(run: Run, tmp_path: Path) -> None:
    text = _SUITE.replace("[2]", "[2, 3, 4]")

    failed, output = run(_plan(tmp_path / "work", text=text), num_jobs=3)

    assert failed == []

    records = [read_run(path) for path in find_run_dirs(tmp_path / "results")]
    assert [r.environment.seed for r in records if r.model] == [2, 3, 4]
    assert {r.environment.hardware.num_jobs for r in records} == {3}

    lines = output.splitlines()
    begun = [i for i, line in enumerate(lines) if line.endswith(" ...")]
    assert begun[:3] == [0, 1, 2], "three begin before the first ends"


def test_runs_at_a_time_have_a_gpu_each(run: Run, tmp_path: Path) -> None:
    text = _SUITE.replace("[2]", "[2, 3]")
    plans = [p for p in _plan(tmp_path / "work", text=text) if not p.is_guess]

    failed, _ = run(plans, fake_stages.train_on_gpu, num_jobs=2, devices=["4", "7"])

    assert failed == []
    gpus = [(p.run_dir / "gpu").read_text() for p in plans]
    assert sorted(gpus) == ["4", "7"]


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    assert plan_jobs(None).devices == ["3", "5"]
    assert plan_jobs(3).devices == ["3", "5", "3"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan_jobs(2).devices == [None, None]


def test_interruption_ends_all_processes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "record_run", interrupt)

    with pytest.raises(KeyboardInterrupt):
        run(_plan(tmp_path / "work"), fake_stages.train_for_ever, num_jobs=3)

    pid = int((tmp_path / "work" / "moxe_s2" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_changed_configuration_is_a_conflict_and_not_reused(
    run: Run, tmp_path: Path
) -> None:
    old = _plan(tmp_path / "work", num_steps=20)
    run(old, fake_stages.train_killed_once)

    new = _plan(tmp_path / "work", num_steps=30)
    conflicts = find_conflicts(new, tmp_path / "results")

    assert find_conflicts(old, tmp_path / "results") == []
    assert [(c.stage.name, c.changes) for c in conflicts] == [
        ("pretrain", ["regime.num_steps: 20 -> 30"])
    ]

    remove_conflicts(conflicts)

    assert find_conflicts(new, tmp_path / "results") == []
    assert not (tmp_path / "work" / "moxe_s2" / "pretrain").exists()


def test_changed_first_stage_invalidates_the_later_ones(
    run: Run, tmp_path: Path
) -> None:
    run(_plan(tmp_path / "work"))

    conflicts = find_conflicts(_plan(tmp_path / "work", 30), tmp_path / "elsewhere")

    assert [c.stage.name for c in conflicts] == ["pretrain", "finetune", "evaluate"]


def test_record_of_another_configuration_stays(run: Run, tmp_path: Path) -> None:
    run(_plan(tmp_path / "work", 20))
    run(_plan(tmp_path / "other_work", 30))

    names = [p.name for p in find_run_dirs(tmp_path / "results")]
    first, second = (name for name in names if name.startswith("moxe"))

    assert second == f"{first}-2"


def test_seed_changes_the_run_and_not_the_recipe(tmp_path: Path) -> None:
    plans = _plan(tmp_path, text=_SUITE.replace("[2]", "[2, 3]"))
    one, two = (plan for plan in plans if not plan.is_guess)

    assert one.recipe_sha256 == two.recipe_sha256
    assert one.config_sha256 != two.config_sha256


def test_two_benchmarks_cannot_share_a_work_directory(tmp_path: Path) -> None:
    with (
        lock_work_dir(tmp_path),
        pytest.raises(SuiteError, match="Another `moxe bench` is at work"),
        lock_work_dir(tmp_path),
    ):
        pass


def test_commands_of_a_run_can_be_repeated_by_hand(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path, text=_SUITE + "pretrain_config: {regime.num_steps: 5, a.b: null}"
    )[-1]

    assert plan.stages[0].argv == [
        *("lm", "pretrain", f"{tmp_path}/moxe_s2/pretrain", "--preset", "smoke"),
        *("--no-rich", "--config", "common.seed=2", "common.no_sweep_dir=true"),
        *("regime.num_steps=5", "a.b=null"),
    ]
    assert plan.stages[1].argv[3:7] == [
        *("--preset", "instruct/quickstart", "--from", f"{tmp_path}/moxe_s2/pretrain")
    ]


def test_commands_by_hand_hold_what_environment_variables_stood_for(
    tmp_path: Path,
) -> None:
    text = _SUITE + 'pretrain_config: {dataset.path: "${env:MY_DATA:data}/text"}'
    suite = parse_suite(text, "suite")
    content = fake_stages.resolve(suite)
    content["configs"]["moxe_s2"]["pretrain"]["dataset"] = {"path": "/my/text"}

    plan = plan_suite(suite, Resolution(**content), tmp_path)[-1]

    assert plan.stages[0].argv[-1] == 'dataset.path="/my/text"'


def test_state_files_are_json(run: Run, tmp_path: Path) -> None:
    run(_plan(tmp_path / "work"))

    state = json.loads((tmp_path / "work/moxe_s2/pretrain.json").read_text())

    assert state["status"] == "done"
    assert state["elapsed_s"] > 0
