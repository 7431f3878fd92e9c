"""Run tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import lm_eval.evaluator
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.resources import resource_dir

_BOOTSTRAP_ITERS: Final = 1000
"""For the standard error of a perplexity, which they give to about 2 %. The harness'
default of 100,000 takes longer than scoring a small model does."""

_SEED: Final = 1234
"""The harness' default."""


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    batch_size: int | str = "auto",
    limit: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a model on tasks, the harness' and those in ``eval_tasks``.

    :param loaded: The model.
    :param tasks: Names of tasks.
    :param batch_size: As in :class:`~moxe_plugin.eval.batching.Batching`.
    :param limit: The most documents of each task; all if ``None``. For tests.
    :param metadata: Arguments of the tasks' datasets, such as ``file``.

    :returns: The harness' results as plain JSON values, without samples: ``results``
        holds each task's metrics, ``config`` the model's description.

    :raises ValueError: A task is not known.
    """
    task_dict = _load_tasks(tasks, dict(metadata or {}))

    for task in task_dict["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)

    torch.manual_seed(_SEED)
    lm = LoadedModelLM(loaded, batch_size=batch_size)

    # Not `simple_evaluate`, which spends seconds on describing the machine.
    results = lm_eval.evaluator.evaluate(
        lm=lm,
        task_dict=task_dict,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP_ITERS,
        log_samples=False,
    )

    results["config"] = {
        **lm.get_model_info(),
        "batch_size": batch_size,
        "limit": limit,
        "bootstrap_iters": _BOOTSTRAP_ITERS,
        "seed": _SEED,
    }

    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    assert isinstance(plain, dict)

    return plain


def _load_tasks(tasks: Sequence[str], metadata: dict[str, Any]) -> Any:
    path = str(resource_dir("eval_tasks"))

    # To read the harness' thousands of YAML files takes longer than our tasks.
    manager = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
    ours = manager.all_tasks

    if not set(tasks) <= set(ours):
        manager = TaskManager(include_path=path, metadata=metadata)

    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"`tasks` must name known tasks, but has {', '.join(unknown)}. Tasks of "
            f"this package: {', '.join(ours)}; `lm_eval ls tasks` lists the others."
        )

    return manager.load(list(tasks))
