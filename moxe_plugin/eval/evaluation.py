"""Run tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.resources import resource_dir

_BOOTSTRAP_ITERS: Final = 1000
"""For the standard error of a perplexity, which they give to about 2 %. The harness'
default of 100,000 takes longer than scoring a small model does."""


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
    task_manager = TaskManager(
        include_path=str(resource_dir("eval_tasks")), metadata=dict(metadata or {})
    )

    unknown = [t for t in tasks if t not in task_manager.all_tasks]
    if unknown:
        ours = [t for t in task_manager.all_subtasks if t.startswith("moxe_")]
        raise ValueError(
            f"`tasks` must name known tasks, but has {', '.join(unknown)}. Tasks of "
            f"this package: {', '.join(ours)}; `lm_eval ls tasks` lists the others."
        )

    results = simple_evaluate(
        model=LoadedModelLM(loaded, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=task_manager,
        batch_size=batch_size,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP_ITERS,
        log_samples=False,
    )

    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    assert isinstance(plain, dict)

    return plain
