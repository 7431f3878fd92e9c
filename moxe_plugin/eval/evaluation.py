"""Run tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import lm_eval.evaluator
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from moxe_plugin.eval.adapter import LoadedModelLM
from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.eval.items import collect_items
from moxe_plugin.resources import resource_dir

_BOOTSTRAP_ITERS: Final = 1000
"""For the standard error of a perplexity, which they give to about 2 %. The harness'
default of 100,000 takes longer than scoring a small model does."""

_SEED: Final = 1234
"""The harness' default."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task to run."""

    task: str
    """Its name: the harness', or one of ``eval_tasks``."""

    limit: int | None = None
    """The most documents, from the first on; all if ``None``."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the task's dataset, such as ``file``."""


class Evaluation(NamedTuple):
    """What a model got on some tasks."""

    results: dict[str, Any]
    """The harness' results as plain JSON values, without samples: ``results`` holds
    each task's metrics, ``config`` the model's description and seconds by task."""

    items: dict[str, dict[str, list[Any]]]
    """Values by document of each task, as
    :func:`~moxe_plugin.eval.items.collect_items` lists them."""


def evaluate(
    loaded: LoadedModel,
    requests: Sequence[TaskRequest],
    *,
    batch_size: int | str = "auto",
    add_bos_token: bool = False,
) -> Evaluation:
    """Score a model on tasks, the harness' and those in ``eval_tasks``.

    :param loaded: The model.
    :param requests: The tasks.
    :param batch_size: As in :class:`~moxe_plugin.eval.batching.Batching`.
    :param add_bos_token: As in :class:`~moxe_plugin.eval.text_codec.TextCodec`.

    :returns: The results.

    :raises ValueError: A task is not known, or twice there.
    """
    lm = LoadedModelLM(loaded, batch_size=batch_size, add_bos_token=add_bos_token)

    results: dict[str, Any] = {}
    items: dict[str, dict[str, list[Any]]] = {}
    wall_s: dict[str, float] = {}

    for request in requests:
        if request.task in wall_s:
            raise ValueError(f"`requests` must not repeat a task: {request.task}.")

        began = time.monotonic()

        task_results, task_items = _run_task(lm, request)
        for key, content in task_results.items():
            results.setdefault(key, {}).update(content)
        items |= task_items

        wall_s[request.task] = round(time.monotonic() - began, 3)

    results["config"] = {
        **lm.get_model_info(),
        "batch_size": batch_size,
        "limits": {request.task: request.limit for request in requests},
        "bootstrap_iters": _BOOTSTRAP_ITERS,
        "seed": _SEED,
        "wall_s": wall_s,
    }

    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    assert isinstance(plain, dict)

    return Evaluation(plain, items)


def _run_task(
    lm: LoadedModelLM, request: TaskRequest
) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    # One task at a time: arguments and limits are the harness' for all of a call.
    task_dict = _load_task(request.task, dict(request.arguments))

    for task in task_dict["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)

    torch.manual_seed(_SEED)

    # Not `simple_evaluate`, which spends seconds on describing the machine.
    results = lm_eval.evaluator.evaluate(
        lm=lm,
        task_dict=task_dict,
        limit=request.limit,
        bootstrap_iters=_BOOTSTRAP_ITERS,
        log_samples=True,
    )
    samples = results.pop("samples")

    items = {
        name: collect_items(task.OUTPUT_TYPE, samples[name], lm.count_target_tokens)
        for name, task in task_dict["tasks"].items()
    }

    return results, {name: columns for name, columns in items.items() if columns}


def _load_task(task: str, metadata: dict[str, Any]) -> Any:
    path = str(resource_dir("eval_tasks"))

    # To read the harness' thousands of YAML files takes longer than our tasks.
    manager = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
    ours = manager.all_tasks

    if task not in ours:
        manager = TaskManager(include_path=path, metadata=metadata)

    if task not in manager.all_tasks:
        raise ValueError(
            f"`requests` must name known tasks, but has {task}. Tasks of this package: "
            f"{', '.join(ours)}; `lm_eval ls tasks` lists the others."
        )

    return manager.load([task])
