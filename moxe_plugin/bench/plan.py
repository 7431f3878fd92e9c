"""What a suite has to do: runs, their stages, and the configuration of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moxe_plugin.bench.commands import RECIPES, StageName, train_argv
from moxe_plugin.bench.stage_state import StageState, hash_config
from moxe_plugin.bench.suite import Suite, System


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What a suite's presets and data are; found out by a child process."""

    configs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Resolved configuration by run (:func:`run_key`) and training stage."""

    data: Mapping[str, Mapping[str, Any]]
    """Facts of :class:`~moxe_plugin.report.records.Data` by run."""

    tasks: Sequence[Any]
    """The suite's tasks as plain values: a name, or a mapping."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a run; picklable, it is what the stage's process gets."""

    name: StageName
    run_dir: Path
    """Where the run's work lies; the stage may read what earlier stages left there."""

    argv: Sequence[str] = ()
    """The arguments of ``fairseq2`` that run a training stage by hand."""

    config: Mapping[str, Any]
    """The resolved configuration of a training stage; the options of another."""

    config_sha256: str
    """Hash of this configuration, those of earlier stages, and the data."""

    @property
    def state_file(self) -> Path:
        """Where the state of the stage is kept."""
        return self.run_dir / f"{self.name}.json"

    @property
    def output_dir(self) -> Path:
        """The output directory of a training stage."""
        return self.run_dir / self.name

    @property
    def num_steps(self) -> int | None:
        """How many steps a training stage has."""
        steps: int | None = self.config.get("regime", {}).get("num_steps")

        return steps

    def start(self) -> StageState:
        """Return the state of the stage before its first attempt.

        :returns: The state.
        """
        return StageState(config_sha256=self.config_sha256, config=self.config)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One system with one seed, or a guess."""

    system: str
    label: str
    seed: int | None
    data: Mapping[str, Any]
    stages: Sequence[StagePlan]
    recipe_sha256: str
    """As :attr:`moxe_plugin.report.records.Environment.recipe_sha256`."""

    @property
    def is_guess(self) -> bool:
        """Whether nothing is trained."""
        return self.seed is None

    @property
    def title(self) -> str:
        """What messages call the run."""
        return self.label if self.is_guess else f"{self.label}, seed {self.seed}"

    @property
    def config_sha256(self) -> str:
        """Hash of everything that the run's numbers depend on, but the code."""
        return self.stages[-1].config_sha256

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of every stage."""
        return {stage.name: stage.config for stage in self.stages}

    @property
    def run_dir(self) -> Path:
        """Where the run's work lies."""
        return self.stages[0].run_dir


_GUESSES: Final = {n: f"{n} guess" for n in ("uniform", "unigram", "bigram")}


def run_key(system: System, seed: int) -> str:
    """Name a run within its suite.

    :param system: The system.
    :param seed: The seed.

    :returns: For example ``moxe_s2``.
    """
    return f"{system.name}_s{seed}"


def plan_suite(suite: Suite, resolution: Resolution, work_dir: Path) -> list[RunPlan]:
    """List the runs of a suite, with the guesses first.

    :param suite: The suite.
    :param resolution: What its presets and data are.
    :param work_dir: Where work is done.

    :returns: The runs.
    """
    options = {"tasks": list(resolution.tasks), "batch_size": suite.batch_size}

    runs = [
        _plan_run(suite, system, seed, resolution, work_dir, options)
        for seed in suite.seeds
        for system in suite.systems
    ]

    guesses = {
        hash_config(run.data): _plan_guesses(run, work_dir, options) for run in runs
    }

    return [*(guess for pair in guesses.values() for guess in pair), *runs]


def _plan_run(
    suite: Suite,
    system: System,
    seed: int,
    resolution: Resolution,
    work_dir: Path,
    options: Mapping[str, Any],
) -> RunPlan:
    key = run_key(system, seed)
    run_dir, data = work_dir / key, resolution.data[key]

    stages: list[StagePlan] = []
    chain: list[object] = [data]
    recipe_chain: list[object] = [data]

    def append(name: StageName, argv: Sequence[str], config: Mapping[str, Any]) -> None:
        identity = _without_places(config, work_dir)
        chain.append(identity)
        recipe_chain.append(_without_seed(identity))

        stages.append(
            StagePlan(
                name=name,
                run_dir=run_dir,
                argv=argv,
                config=config,
                config_sha256=hash_config(chain),
            )
        )

    for name in RECIPES:
        if (config := resolution.configs[key].get(name)) is not None:
            argv = train_argv(suite, system, seed, name, run_dir, config)
            append(name, argv, config)

    if system.finetune is None:
        options = _of_pretrained(options)

    append("evaluate", (), options)

    return RunPlan(
        system=system.name,
        label=system.label,
        seed=seed,
        data=data,
        stages=stages,
        recipe_sha256=hash_config(recipe_chain),
    )


def _plan_guesses(
    run: RunPlan, work_dir: Path, options: Mapping[str, Any]
) -> list[RunPlan]:
    pretrain = run.stages[0]

    plans = []

    for name, label in _GUESSES.items():
        # What to read, and how: exactly what the trained systems read.
        config = {
            **_of_pretrained(options),
            "guess": name,
            "dataset": pretrain.config["dataset"],
            "tokenizer": pretrain.config["tokenizer"],
        }
        sha256 = hash_config([run.data, _without_places(config, work_dir)])

        stage = StagePlan(
            name="guess",
            run_dir=work_dir / f"{name}_{hash_config(run.data)[:8]}",
            config=config,
            config_sha256=sha256,
        )

        plans.append(
            RunPlan(
                system=name,
                label=label,
                seed=None,
                data=run.data,
                stages=[stage],
                recipe_sha256=sha256,
            )
        )

    return plans


def _of_pretrained(options: Mapping[str, Any]) -> dict[str, Any]:
    tasks = [
        task
        for task in options["tasks"]
        if isinstance(task, str) or task.get("stage") != "finetuned"
    ]

    return {**options, "tasks": tasks}


def _without_places(config: Mapping[str, Any], work_dir: Path) -> dict[str, Any]:
    # What is built in the work directory is named by its content. The content of a
    # task's file is hashed; only a mapping has one.
    def relocate(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                k: relocate(v)
                for k, v in value.items()
                if k != "file" or "file_sha256" not in value
            }

        if isinstance(value, list):
            return [relocate(v) for v in value]

        is_within = isinstance(value, str) and value.startswith(f"{work_dir}/")

        return value.removeprefix(f"{work_dir}/") if is_within else value

    return {key: relocate(value) for key, value in config.items()}


def _without_seed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if "common" not in config:
        return config

    config = copy.deepcopy(dict(config))
    config["common"].pop("seed", None)

    return config
