"""The numbers of a trained run: harness tasks, and the loss on held-out answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fairseq2.data.tokenizers import Tokenizer
from fairseq2.datasets import SequenceBatch
from fairseq2.device import CPU
from fairseq2.gang import create_fake_gangs
from fairseq2.models.clm import CausalLM
from torch import Tensor

from moxe_plugin.bench.plan import StagePlan
from moxe_plugin.bench.resolution import open_instructions_section
from moxe_plugin.bench.stage_state import read_state
from moxe_plugin.bench.suite import TaskStage
from moxe_plugin.eval.checkpoints import LoadedModel, load_checkpoint
from moxe_plugin.eval.evaluation import Evaluation, TaskRequest, evaluate
from moxe_plugin.models.clm import AuxLossCausalLM


def evaluate_run(stage: StagePlan) -> dict[str, Any]:
    """Evaluate the checkpoints of a run.

    :param stage: The evaluation stage.

    :returns: ``evals``: files of the record by name; ``items``: values by document of
        each task; ``model``: fields of :class:`~moxe_plugin.report.records.ModelInfo`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    pretrained = load_checkpoint(stage.run_dir / "pretrain", device=device)

    evaluation = evaluate_tasks(pretrained, stage.config, "pretrained")
    evals, items = {"pretrained": evaluation.results}, evaluation.items

    state = read_state(stage.run_dir / "finetune.json")
    if state is not None:
        finetuned = load_checkpoint(stage.run_dir / "finetune", device=device)

        evals["instructions"] = {
            name: measure_instruction_loss(
                loaded.model, loaded.tokenizer, state.config["dataset"]
            )
            for name, loaded in (("pretrained", pretrained), ("finetuned", finetuned))
        }

        evaluation = evaluate_tasks(finetuned, stage.config, "finetuned")
        if evaluation.results:
            evals["finetuned"] = evaluation.results
            items |= evaluation.items

    return {"evals": evals, "items": items, "model": _describe_model(pretrained)}


def evaluate_tasks(
    loaded: LoadedModel, options: Mapping[str, Any], stage: TaskStage
) -> Evaluation:
    """Evaluate a model with lm-evaluation-harness.

    :param loaded: The model.
    :param options: ``tasks`` and ``batch_size``.
    :param stage: Whose tasks to run.

    :returns: The results; empty without tasks.
    """
    tasks: list[Mapping[str, Any]] = [
        {"task": task} if isinstance(task, str) else task for task in options["tasks"]
    ]

    requests = [
        TaskRequest(
            task=task["task"],
            limit=task.get("limit"),
            arguments={
                **task.get("arguments", {}),
                **({"file": task["file"]} if "file" in task else {}),
            },
        )
        for task in tasks
        if task.get("stage", "pretrained") == stage
    ]

    if not requests:
        return Evaluation({}, {})

    # In instructions a prompt follows the beginning of sequence, if there is one.
    has_bos = loaded.tokenizer.vocab_info.bos_idx is not None

    return evaluate(
        loaded,
        requests,
        batch_size=options["batch_size"],
        add_bos_token=stage == "finetuned" and has_bos,
    )


def measure_instruction_loss(
    model: CausalLM, tokenizer: Tokenizer, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the loss on held-out answers, given their questions.

    :param model: The model, in evaluation mode.
    :param tokenizer: Its tokenizer.
    :param section: The ``dataset`` section of the finetuning; the whole validation
        split is read, whatever the section says about a part of it.

    :returns: ``nll_nats``: the mean over answer tokens; ``num_tokens``: their number.
    """
    reader = open_instructions_section(section).create_reader(
        section["valid_split"],
        tokenizer,
        create_fake_gangs(CPU),
        batch_size=section["batch_size"],
        max_seq_len=section["seq_len"],
        shuffle=False,
    )

    return measure_loss(model, (batch for step in reader for batch in step))


@torch.inference_mode()
def measure_loss(model: CausalLM, batches: Iterable[SequenceBatch]) -> dict[str, Any]:
    """Measure the mean cross-entropy over all targets.

    :param model: The model, in evaluation mode.
    :param batches: Batches as a recipe's validation reads them.

    :returns: ``nll_nats`` and ``num_tokens``.
    """
    device = next(model.parameters()).device

    total, num_targets = 0.0, 0

    for batch in batches:
        batch.to(device)

        inputs, targets = batch.as_auto_regressive()
        seqs, seqs_layout = inputs.as_input()

        nll = model(
            seqs,
            seqs_layout,
            targets=targets.seqs,
            target_mask=targets.target_mask,
            reduction="sum",
        )
        assert isinstance(nll, Tensor)

        total += float(nll)
        num_targets += targets.num_target_elements

    return {"nll_nats": total / num_targets, "num_tokens": num_targets}


def _describe_model(loaded: LoadedModel) -> dict[str, Any]:
    model = loaded.model
    assert isinstance(model, AuxLossCausalLM)

    num_parameters = sum(p.numel() for p in model.parameters())

    recipe_config = loaded.provenance["recipe_config"]

    return {
        "family": loaded.provenance["model_family"],
        "arch": recipe_config["model"]["arch"],
        "num_parameters": num_parameters,
        "num_active_parameters": round(num_parameters - model.num_idle_parameters()),
    }
