"""Talks with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, final

from fairseq2.generation import SequenceGenerator
from fairseq2.generation.sampling import Sampler, SamplingSequenceGenerator
from fairseq2.logging import log
from fairseq2.models.clm import CausalLM
from fairseq2.recipe import Recipe, RecipeContext
from fairseq2.recipe.component import ComponentManager, ComponentNotKnownError
from fairseq2.recipe.config import SamplingConfig
from fairseq2.recipe.error import RecipeError, SamplerNotKnownError
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.task import Task
from typing_extensions import override

from moxe_plugin.data.turns import TurnEncoder, find_turn_format
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.train_output import open_train_output
from moxe_plugin.train.chat.config import LMChatConfig
from moxe_plugin.train.chat.conversation import Conversation, GeneratorFactory
from moxe_plugin.train.chat.task import EXIT, RESET, ChatTask
from moxe_plugin.train.checks import check_gangs, check_vocabulary
from moxe_plugin.train.errors import register_errors
from moxe_plugin.train.pretrained import check_pretrained
from moxe_plugin.train.safe_resume import check_named_checkpoints


@final
class LMChatRecipe(Recipe):
    """The recipe ``lm chat``."""

    @override
    def register(self, container: DependencyContainer) -> None:
        register_errors(container)

    @override
    def create_task(self, context: RecipeContext) -> Task:
        config = context.get_config_as(LMChatConfig)

        check_gangs(context.gangs)
        check_named_checkpoints(config.common)

        if (num_processes := context.gangs.root.size) > 1:
            raise RecipeError(
                f"`lm chat` must run in one process, but there are {num_processes}."
            )

        check_pretrained(config.pretrained)

        model = context.get_model_as(AuxLossCausalLM)

        tokenizer = context.get_tokenizer()

        check_vocabulary(model, tokenizer)

        if tokenizer.vocab_info.eos_idx is None:
            raise RecipeError(
                "`tokenizer` must have a token that ends a text, or answers have no "
                "end, but has none."
            )

        turn_format = config.turn_format
        if turn_format == "auto":
            turn_format = find_turn_format(_read_training(config), tokenizer)

        sampling = config.seq_generator.config
        assert isinstance(sampling, SamplingConfig)

        max_gen_len = sampling.max_gen_len
        if isinstance(max_gen_len, tuple):
            max_gen_len = int(max_gen_len[1])

        conversation = Conversation(
            model,
            tokenizer,
            TurnEncoder(tokenizer, turn_format),
            _create_factory(context, sampling),
            max_gen_len=max_gen_len,
            context_len=_find_context_len(model, sampling),
            on_forget=_tell_of_forgetting,
        )

        file = context.output_dir / "output" / "chat.jsonl"
        file.parent.mkdir(exist_ok=True)

        return ChatTask(
            conversation,
            sys.stdin,
            sys.stdout,
            file.open("a", encoding="utf-8"),
            greeting=f"{config.pretrained.source or config.model.name}, "
            f"turns as {turn_format}; {RESET} begins anew, {EXIT} or Ctrl-D ends, "
            "Ctrl-C ends an answer.",
            trained_len=model.max_seq_len,
            writes_json=config.json_output,
            seed=config.common.seed,
        )

    @property
    @override
    def config_kls(self) -> type[object]:
        return LMChatConfig


def _read_training(config: LMChatConfig) -> Any:
    source = config.pretrained.source

    if source is None or not Path(source).is_dir():
        return {}

    try:
        return open_train_output(Path(source), config.pretrained.step).recipe_config
    except ValueError:
        # An exported model; what has no checkpoint at all was refused before.
        return {}


def _create_factory(
    context: RecipeContext, sampling: SamplingConfig
) -> GeneratorFactory:
    components = context.resolver.resolve(ComponentManager)

    try:
        sampler = components.create_component(
            Sampler, sampling.sampler.name, sampling.sampler.config
        )
    except ComponentNotKnownError:
        raise SamplerNotKnownError(sampling.sampler.name) from None

    vocab_info = context.get_tokenizer().vocab_info

    def create_generator(model: CausalLM, max_gen_len: int) -> SequenceGenerator:
        return SamplingSequenceGenerator(
            model,
            vocab_info,
            sampler,
            min_gen_len=min(sampling.min_gen_len, max_gen_len),
            max_gen_len=max_gen_len,
            temperature=sampling.temperature,
            unk_penalty=sampling.unk_penalty,
            prefill_chunk_size=sampling.prefill_chunk_size,
        )

    return create_generator


def _find_context_len(model: AuxLossCausalLM, sampling: SamplingConfig) -> int | None:
    if model.has_recurrent_state:
        return sampling.max_seq_len

    if sampling.max_seq_len is None:
        return model.max_seq_len

    return min(sampling.max_seq_len, model.max_seq_len)


def _tell_of_forgetting() -> None:
    log.warning("The context is full: from now on the oldest turns are forgotten.")
