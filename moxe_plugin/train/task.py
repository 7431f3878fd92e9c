"""What the training recipes do alike: get the model, create the trainer."""

from __future__ import annotations

from typing import NamedTuple

from fairseq2.data.tokenizers import Tokenizer
from fairseq2.datasets import DataReader, SequenceBatch
from fairseq2.logging import log
from fairseq2.recipe import RecipeContext
from fairseq2.trainer import Trainer
from torch.nn import Module

from moxe_plugin.allocator import keep_freed_memory
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.train.checks import (
    check_gangs,
    check_model_section,
    check_seq_len,
    check_vocabulary,
)
from moxe_plugin.train.config import TrainConfig
from moxe_plugin.train.continuing import (
    CommitGate,
    keep_model_card,
    prepare_continuation,
    refuse_other_model,
)
from moxe_plugin.train.finite import FiniteWatch
from moxe_plugin.train.routing_recorder import LoadHistory
from moxe_plugin.train.safe_resume import (
    check_named_checkpoints,
    check_resumed_checkpoint,
)
from moxe_plugin.train.topology import balance_over_processes, check_topology
from moxe_plugin.train.units import CausalLMEvalUnit, CausalLMTrainUnit


class PreparedModel(NamedTuple):
    """A model to train, and the tokenizer that goes with it."""

    dp_model: Module
    """The model in its data-parallel wrapper."""

    model: AuxLossCausalLM
    """The model itself."""

    tokenizer: Tokenizer
    """The tokenizer."""


def prepare_model(context: RecipeContext, seq_len: int) -> PreparedModel:
    """Create or load the model, and check that it fits the run.

    :param context: The context of the recipe.
    :param seq_len: The maximum number of tokens of a training sequence.

    :returns: The model and its tokenizer.
    """
    config = context.get_config_as(TrainConfig)

    check_gangs(context.gangs)
    check_model_section(context.resolver, config.model)
    check_named_checkpoints(config.common)
    prepare_continuation(context.output_dir, context.gangs.root)
    check_resumed_checkpoint(context)
    check_topology(context)

    if config.keep_freed_memory and context.gangs.root.device.type == "cpu":
        _keep_freed_memory()

    with refuse_other_model(context):
        dp_model = context.get_data_parallel_model()

    model = context.get_model_as(AuxLossCausalLM)

    tokenizer = context.get_tokenizer()

    check_vocabulary(model, tokenizer)
    check_seq_len(model, seq_len)

    if config.balance_over == "global":
        balance_over_processes(model, context.gangs)

    return PreparedModel(dp_model, model, tokenizer)


def _keep_freed_memory() -> None:
    reason = keep_freed_memory()

    if reason is None:
        log.info("Freed memory stays in the process, for the next step.")
    else:
        log.info("`keep_freed_memory` has no effect: {}.", reason)


def create_lm_trainer(
    context: RecipeContext,
    prepared: PreparedModel,
    reader: DataReader[SequenceBatch],
    valid_reader: DataReader[SequenceBatch] | None,
    *,
    num_bytes_per_token: float | None = None,
) -> Trainer:
    """Create the trainer of a causal language model.

    :param context: The context of the recipe.
    :param prepared: The model.
    :param reader: Reads the training data.
    :param valid_reader: Reads the validation data, if there is a validation.
    :param num_bytes_per_token: How many bytes of text a validation target stands for
        on average, if known.

    :returns: The trainer.
    """
    dp_model, model, _ = prepared

    gangs, output_dir = context.gangs, context.output_dir

    watch = FiniteWatch(gangs.root, output_dir)

    gate = CommitGate(context.get_checkpoint_manager())

    unit = CausalLMTrainUnit(
        dp_model,
        model,
        context.resolver.resolve(LoadHistory),
        finite_watch=watch,
        commit_gate=gate,
    )

    optimizer = context.get_optimizer()

    # Neither is called for a step that fp16 gives up.
    optimizer.register_step_pre_hook(watch.check_step)
    optimizer.register_step_post_hook(lambda *_: unit.finish_step(gangs.dp))

    if valid_reader is None:
        trainer = context.create_trainer(unit, reader)
    else:
        valid_unit = CausalLMEvalUnit(dp_model, model, num_bytes_per_token, gate)

        trainer = context.create_trainer(unit, reader, [valid_unit], [valid_reader])

    if gangs.root.rank == 0:
        trainer.register_checkpoint_save_hook(
            lambda args: keep_model_card(output_dir, args.step_nr)
        )

    return trainer
