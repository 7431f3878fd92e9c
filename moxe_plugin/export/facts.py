"""Collects what is known of a trained model: from its training, and from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moxe_plugin.bench.metrics import read_train_metrics, read_valid_metrics, sum_up
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.run_dirs import ENVIRONMENT_FILE, read_run


class Score(NamedTuple):
    """One number of an evaluation."""

    task: str
    """What was evaluated, as lm-evaluation-harness calls it, or a validation split."""

    metric: str
    """What was measured."""

    value: float
    """How much."""


class Facts(NamedTuple):
    """What a model card says."""

    family: str
    """The name of the family."""

    num_parameters: int
    """All parameters."""

    dtype: str
    """Their type."""

    model_config: Mapping[str, Any]
    """The configuration of the family."""

    source: str
    """The training output directory or the asset name, without the directories above.
    """

    step: int | None
    """The training step; ``None`` for an asset."""

    recipe_config: Mapping[str, Any]
    """The configuration of the training; empty for an asset."""

    num_tokens: int | None
    """The target tokens of the training until ``step``, if its metrics are there."""

    scores: Sequence[Score]
    """The validation at ``step``, and evaluations of the record."""

    record: RunRecord | None
    """The record of the run."""


def collect_facts(loaded: LoadedModel, run_dir: Path | None) -> Facts:
    """Collect what is known of a model.

    :param loaded: The model.
    :param run_dir: The record of its run, if there is one.

    :returns: The facts.

    :raises ValueError: ``run_dir`` is no record, or that of another model.
    """
    parameters = list(loaded.model.parameters())

    facts = Facts(
        family=loaded.provenance["model_family"],
        num_parameters=sum(p.numel() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        model_config=loaded.provenance["model_config"],
        source=Path(loaded.name).name,
        step=loaded.step,
        recipe_config=loaded.provenance.get("recipe_config") or {},
        num_tokens=None,
        scores=(),
        record=None,
    )

    if loaded.step is not None:
        facts = _add_metrics(facts, Path(loaded.name), loaded.step)

    return facts if run_dir is None else _add_record(facts, run_dir)


def _add_metrics(facts: Facts, output_dir: Path, step: int) -> Facts:
    train = [m for m in read_train_metrics(output_dir, "") if m["Step"] <= step]
    valid = [m for m in read_valid_metrics(output_dir, "") if m["Step"] == step]

    reaches_step = bool(train) and train[-1]["Step"] == step

    scores = [
        Score(f"validation split '{metrics['Split']}'", name, metrics[name])
        for metrics in valid
        for name in ("NLL Loss", "Perplexity", "Bits per Byte")
        if name in metrics
    ]

    return facts._replace(
        num_tokens=sum_up(train).num_tokens if reaches_step else None, scores=scores
    )


def _add_record(facts: Facts, run_dir: Path) -> Facts:
    if not (run_dir / ENVIRONMENT_FILE).is_file():
        raise ValueError(
            f"`run_dir` must be the record of a run, but '{run_dir}' has no "
            f"{ENVIRONMENT_FILE}."
        )

    record = read_run(run_dir)

    seed = facts.recipe_config.get("common", {}).get("seed")

    ours = (facts.family, facts.num_parameters, seed)
    theirs = (
        None if record.model is None else record.model.family,
        None if record.model is None else record.model.num_parameters,
        record.environment.seed,
    )

    if ours != theirs:
        raise ValueError(
            f"`run_dir` must be the record of the exported model, but '{run_dir}' has "
            f"family, parameters and seed {theirs} instead of {ours}."
        )

    return facts._replace(
        record=record, scores=[*facts.scores, *_list_scores(facts, record)]
    )


def _list_scores(facts: Facts, record: RunRecord) -> list[Score]:
    """List the scores of this checkpoint; a record has those of several stages."""
    return [
        Score(task, metric.removesuffix(",none"), value)
        for report in record.evals.values()
        if _is_of_this(facts, report.get("config", {}))
        for task, metrics in report["results"].items()
        for metric, value in metrics.items()
        # The others count documents, or are no numbers.
        if "," in metric and isinstance(value, (int, float))
    ]


def _is_of_this(facts: Facts, config: Mapping[str, Any]) -> bool:
    source = Path(str(config.get("model_name"))).name

    return config.get("model_step") == facts.step and source == facts.source
