"""Trains a pretrained causal language model to respond to instructions."""

from __future__ import annotations

from typing import final

from fairseq2.recipe import Recipe, RecipeContext
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.task import Task
from typing_extensions import override

from moxe_plugin.data.instructions import InstructionsDataset
from moxe_plugin.train.continuing import list_resumable_steps
from moxe_plugin.train.errors import register_errors
from moxe_plugin.train.instruction_finetune.config import LMInstructionFinetuneConfig
from moxe_plugin.train.metrics import register_metric_descriptors
from moxe_plugin.train.pretrained import check_pretrained
from moxe_plugin.train.routing_recorder import register_routing_recorder
from moxe_plugin.train.safe_resume import register_unsafe_checkpoint_error
from moxe_plugin.train.task import create_lm_trainer, prepare_model


@final
class LMInstructionFinetuneRecipe(Recipe):
    """The recipe ``lm instruction_finetune``."""

    @override
    def register(self, container: DependencyContainer) -> None:
        register_metric_descriptors(container)
        register_routing_recorder(container)
        register_unsafe_checkpoint_error(container)
        register_errors(container)

    @override
    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(LMInstructionFinetuneConfig)

        section = config.dataset

        # A run that continues does not read it again.
        if not list_resumable_steps(context.output_dir):
            check_pretrained(config.pretrained)

        prepared = prepare_model(context, section.seq_len)

        dataset = context.get_dataset_as(InstructionsDataset)

        reader = dataset.create_reader(
            section.train_split,
            prepared.tokenizer,
            context.gangs,
            batch_size=section.batch_size,
            max_seq_len=section.seq_len,
            seed=config.common.seed,
            num_accumulate=config.trainer.grad_accumulation.num_batches,
        )

        if section.valid_split is None:
            return create_lm_trainer(context, prepared, reader, None)

        valid_reader = dataset.create_reader(
            section.valid_split,
            prepared.tokenizer,
            context.gangs,
            batch_size=section.batch_size,
            max_seq_len=section.seq_len,
            shuffle=False,
            max_num_batches=section.max_num_valid_batches,
        )

        return create_lm_trainer(context, prepared, reader, valid_reader)

    @property
    @override
    def config_kls(self) -> type[object]:
        return LMInstructionFinetuneConfig
