"""Trains a causal language model to predict the next token."""

from __future__ import annotations

from typing import final

from fairseq2.recipe import Recipe, RecipeContext
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.task import Task
from typing_extensions import override

from moxe_plugin.data.tokens import TokensDataset
from moxe_plugin.train.errors import register_errors
from moxe_plugin.train.metrics import register_metric_descriptors
from moxe_plugin.train.pretrain.config import LMPretrainConfig
from moxe_plugin.train.routing_recorder import register_routing_recorder
from moxe_plugin.train.safe_resume import register_unsafe_checkpoint_error
from moxe_plugin.train.task import create_lm_trainer, prepare_model


@final
class LMPretrainRecipe(Recipe):
    """The recipe ``lm pretrain``."""

    @override
    def register(self, container: DependencyContainer) -> None:
        register_metric_descriptors(container)
        register_routing_recorder(container)
        register_unsafe_checkpoint_error(container)
        register_errors(container)

    @override
    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(LMPretrainConfig)

        section = config.dataset

        prepared = prepare_model(context, section.seq_len)

        dataset = context.get_dataset_as(TokensDataset)

        reader = dataset.create_reader(
            section.train_split,
            context.gangs,
            batch_size=section.batch_size,
            seq_len=section.seq_len,
            tokenizer=prepared.tokenizer,
            seed=config.common.seed,
            num_accumulate=config.trainer.grad_accumulation.num_batches,
        )

        if section.valid_split is None:
            return create_lm_trainer(context, prepared, reader, None)

        valid_reader = dataset.create_reader(
            section.valid_split,
            context.gangs,
            batch_size=section.batch_size,
            seq_len=section.seq_len,
            shuffle=False,
            max_num_batches=section.max_num_valid_batches,
        )

        split = dataset.shards.manifest.splits[section.valid_split]

        return create_lm_trainer(
            context,
            prepared,
            reader,
            valid_reader,
            # The first token of a split is never a target.
            num_bytes_per_token=split.num_bytes / (split.num_tokens - 1),
        )

    @property
    @override
    def config_kls(self) -> type[object]:
        return LMPretrainConfig
