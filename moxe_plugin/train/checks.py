"""Refuses, with one clear line, what would fail late or train a wrong model."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from fairseq2.data.tokenizers import Tokenizer
from fairseq2.gang import Gangs
from fairseq2.models import ModelFamily
from fairseq2.nn import Embedding
from fairseq2.recipe.config import ModelSection
from fairseq2.recipe.error import RecipeError
from fairseq2.runtime.dependency import DependencyLookup, DependencyResolver

from moxe_plugin.models.clm import AuxLossCausalLM


def check_gangs(gangs: Gangs) -> None:
    """Refuse tensor parallelism, which no family of this package implements.

    :param gangs: The process groups of the run.

    :raises RecipeError: ``gang.tensor_parallel_size`` is greater than 1.
    """
    if gangs.tp.size > 1:
        raise RecipeError(
            "`gang.tensor_parallel_size` must be 1, since no model family of "
            f"moxe_plugin shards its parameters, but is {gangs.tp.size} instead. Use "
            "`trainer.data_parallelism=fsdp` to spread a model over devices."
        )


def check_model_section(resolver: DependencyResolver, section: ModelSection) -> None:
    """Make sure that family and architecture of a new model are known.

    :param resolver: Knows the families.
    :param section: Says which model to train.

    :raises RecipeError: One is not; the message names those that are.
    """
    if section.name is not None or section.family is None:
        return

    families = DependencyLookup(resolver, ModelFamily)

    family = families.maybe_get(section.family)

    if family is None:
        known = map(str, families.iter_keys())

        raise _unknown("model.family", section.family, known)

    if section.arch is not None and section.arch not in family.get_archs():
        raise _unknown("model.arch", section.arch, family.get_archs())


def _unknown(name: str, value: str, known: Iterable[str]) -> RecipeError:
    known = sorted(known)

    near = get_close_matches(value, known) or known

    return RecipeError(
        f"`{name}` must be a known name, but is '{value}' instead. Did you mean "
        f"{' or '.join(near)}?"
    )


def check_vocabulary(model: AuxLossCausalLM, tokenizer: Tokenizer) -> None:
    """Make sure that the model has an embedding for every token.

    :param model: The model itself, not its data-parallel wrapper.
    :param tokenizer: The tokenizer of the run.

    :raises RecipeError: The embedding table is smaller than the vocabulary, or the two
        disagree on the padding token.
    """
    # All families have one, as fairseq2's own check asks.
    frontend: Any = model.decoder_frontend

    embed = frontend.embed

    assert isinstance(embed, Embedding)

    vocab_info = tokenizer.vocab_info

    if embed.num_embeddings < vocab_info.size:
        raise RecipeError(
            "The model must have an embedding for each of the tokenizer's "
            f"{vocab_info.size} tokens, but has {embed.num_embeddings} only. Set "
            f"`model.config_overrides.vocab_size={vocab_info.size}`, or choose another "
            "tokenizer."
        )

    if embed.pad_idx != vocab_info.pad_idx:
        raise RecipeError(
            "`pad_idx` of the model must be that of the tokenizer "
            f"({vocab_info.pad_idx}), but is {embed.pad_idx} instead. Set "
            f"`model.config_overrides.pad_idx={_yaml(vocab_info.pad_idx)}`."
        )


def check_seq_len(model: AuxLossCausalLM, seq_len: int) -> None:
    """Make sure that the training sequences fit into the model's context.

    :param model: The model itself, not its data-parallel wrapper.
    :param seq_len: The maximum number of tokens of an input sequence.

    :raises RecipeError: The model's context is shorter.
    """
    if seq_len > model.max_seq_len:
        raise RecipeError(
            "`dataset.seq_len` must be at most the model's `max_seq_len` "
            f"({model.max_seq_len}), but is {seq_len} instead."
        )


def _yaml(value: int | None) -> str:
    return "null" if value is None else str(value)
