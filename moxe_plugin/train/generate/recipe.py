"""Completes prompts with a trained model."""

from __future__ import annotations

import sys
from typing import final

from fairseq2.generator import Generator
from fairseq2.recipe import Recipe, RecipeContext
from fairseq2.runtime.dependency import DependencyContainer, wire_object
from fairseq2.task import Task
from fairseq2.utils.progress import NOOP_PROGRESS_REPORTER
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.train.checks import check_gangs, check_vocabulary
from moxe_plugin.train.errors import register_errors
from moxe_plugin.train.generate.config import LMGenerateConfig
from moxe_plugin.train.generate.prompts import PromptReader, read_prompts
from moxe_plugin.train.generate.unit import CompletionUnit
from moxe_plugin.train.pretrained import check_pretrained
from moxe_plugin.train.safe_resume import check_named_checkpoints


@final
class LMGenerateRecipe(Recipe):
    """The recipe ``lm generate``."""

    @override
    def register(self, container: DependencyContainer) -> None:
        register_errors(container)

    @override
    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(LMGenerateConfig)

        gangs = context.gangs

        check_gangs(gangs)
        check_named_checkpoints(config.common)

        prompts = list(config.prompts)
        if config.prompt_file is not None:
            prompts.extend(read_prompts(config.prompt_file))

        check_pretrained(config.pretrained)

        model = context.get_model_as(AuxLossCausalLM)

        tokenizer = context.get_tokenizer()

        check_vocabulary(model, tokenizer)

        streams = config.stream
        if streams is None:
            streams = len(prompts) == 1 and config.can_stream and sys.stdout.isatty()

        reader = PromptReader(
            prompts,
            tokenizer.create_encoder(mode="prompt"),
            gangs,
            batch_size=1 if streams else config.batch_size,
            max_seq_len=model.max_seq_len,
        )

        file = context.output_dir / "output" / f"rank_{gangs.dp.rank}.jsonl"

        file.parent.mkdir(exist_ok=True)

        unit = CompletionUnit(
            context.get_seq_generator(),
            tokenizer.create_decoder(skip_special_tokens=True),
            file.open("w", encoding="utf-8"),
            sys.stdout if gangs.dp.rank == 0 else None,
            streams=streams,
        )

        if not streams:
            return context.create_generator(unit, reader)

        # As it does, but without a bar that would be drawn over the text.
        return wire_object(
            context.resolver,
            Generator,
            unit=unit,
            data_reader=reader,
            amp=config.generator.amp,
            amp_dtype=config.generator.amp_dtype,
            seed=config.common.seed + 3,
            progress_reporter=NOOP_PROGRESS_REPORTER,
        )

    @property
    @override
    def config_kls(self) -> type[object]:
        return LMGenerateConfig
