"""Load a trained model with its tokenizer: from a training output, or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq2.assets import (
    AssetCard,
    AssetCardError,
    AssetNotFoundError,
    get_asset_store,
)
from fairseq2.data.tokenizers import Tokenizer, load_tokenizer
from fairseq2.model_checkpoint import CorruptModelCheckpointError
from fairseq2.models import ModelFamily, get_model_family_name, load_model
from fairseq2.models.clm import CausalLM
from fairseq2.runtime.dependency import get_dependency_resolver
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.eval.tokenizers import (
    load_exported_tokenizer,
    load_named_tokenizer,
    load_recorded_tokenizer,
)
from moxe_plugin.hf.folder import is_exported, open_exported
from moxe_plugin.models.checkpoint_files import DamagedCheckpointError
from moxe_plugin.models.train_output import check_model, open_train_output


class LoadedModel(NamedTuple):
    """A model ready to be scored, and where it came from."""

    model: CausalLM
    """The model, in evaluation mode."""

    tokenizer: Tokenizer
    """The tokenizer that it was trained with, unless another was asked for."""

    name: str
    """The training output directory or the asset name."""

    step: int | None
    """The training step of the checkpoint; ``None`` for an asset."""

    provenance: Mapping[str, Any]
    """Plain values for a report: checkpoint, family, tokenizer, configuration of the
    model and, for a training output, configuration of the recipe."""

    def describe(self) -> dict[str, Any]:
        """Describe the model for a result file.

        :returns: Plain values by names that begin with ``model_``.
        """
        parameters = list(self.model.parameters())

        return {
            "model_name": self.name,
            "model_step": self.step,
            "model_family": self.provenance.get("model_family"),
            "model_num_parameters": sum(p.numel() for p in parameters),
            "model_dtype": str(parameters[0].dtype),
            "model_device": str(parameters[0].device),
        }


def load_checkpoint(
    path_or_asset: str | Path,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | Tokenizer | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer, for evaluation.

    The name of an existing directory means that directory; anything else is looked up
    in fairseq2's asset store. fairseq2 is initialised on first use, with our families.

    :param path_or_asset: The output directory of a training run (its single sweep
        directory, its ``checkpoints`` or a ``step_N`` in there will do too), the folder
        of an exported model, or an asset name.
    :param step: The training step; the last one by default. Only for directories.
    :param device: Where the parameters go.
    :param dtype: The type of the parameters.
    :param tokenizer: Instead of the tokenizer of the training run: an asset name, a
        directory with a Hugging Face tokenizer, or a tokenizer.

    :returns: The model in evaluation mode, and where it came from.

    :raises ValueError: There is no such checkpoint, step, asset or tokenizer, or the
        model is not a causal language model.
    :raises DamagedCheckpointError: A file of the checkpoint is not as it was written.
    """
    source = _find_source(path_or_asset, step)

    provenance = {
        **source.provenance,
        "model_family": get_model_family_name(source.card),
    }

    if tokenizer is not None:
        provenance["tokenizer"] = str(tokenizer)
        tokenizer = load_named_tokenizer(tokenizer)
    else:
        tokenizer = source.load_tokenizer()

    try:
        model = load_model(source.card, device=torch.device(device), dtype=dtype)
    except AssetCardError as ex:
        raise ValueError(
            f"`checkpoint` cannot be loaded: {_describe_causes(ex)}"
        ) from ex
    except CorruptModelCheckpointError as ex:
        raise DamagedCheckpointError(f"{ex} Restore it from a copy.") from ex

    if not isinstance(model, CausalLM):
        raise ValueError(
            f"`path_or_asset` must be a causal language model, but '{source.name}' is "
            f"of type `{type(model)}` instead."
        )

    _check_tokenizer(model, tokenizer, source)

    model.eval()

    return LoadedModel(model, tokenizer, source.name, source.step, provenance)


def _describe_causes(ex: BaseException) -> str:
    """Tell the error and what caused it; fairseq2 names the file in the former only."""
    messages = []
    cause: BaseException | None = ex

    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__

    return " ".join(messages)


def _check_tokenizer(model: CausalLM, tokenizer: Tokenizer, source: _Source) -> None:
    """Refuse a tokenizer that cannot be that of the training: it would score noise."""
    frontend: Any = getattr(model, "decoder_frontend", None)
    if frontend is None:
        return

    embed, vocab_info = frontend.embed, tokenizer.vocab_info

    if vocab_info.size > embed.num_embeddings:
        raise ValueError(
            "`tokenizer` must have at most as many tokens as the model has embeddings "
            f"({embed.num_embeddings}), but has {vocab_info.size}. Name the one that "
            f"'{source.name}' was trained with."
        )

    # Trainings of this package make sure that the two agree.
    if source.step is not None and embed.pad_idx not in (None, vocab_info.pad_idx):
        raise ValueError(
            f"`tokenizer` must be the one that '{source.name}' was trained with, whose "
            f"padding token is {embed.pad_idx}, but that of this one is "
            f"{vocab_info.pad_idx}."
        )


class _Source(NamedTuple):
    card: AssetCard
    """Taken as a card, what files say needs no asset store."""

    name: str
    step: int | None
    load_tokenizer: Callable[[], Tokenizer]
    provenance: Mapping[str, Any]


def _find_source(path_or_asset: str | Path, step: int | None) -> _Source:
    path = Path(path_or_asset)

    if not path.is_dir():
        return _find_asset(str(path_or_asset), step)

    if is_exported(path):
        return _find_exported(path, step)

    return _find_train_output(path, step)


def _find_train_output(path: Path, step: int | None) -> _Source:
    output = open_train_output(path, step)

    check_model(output)

    checkpoint = {"checkpoint": str(output.model_dir)}
    section = output.recipe_config.get("tokenizer")

    return _Source(
        AssetCard("checkpoint", {**output.model_card, **checkpoint}),
        str(output.dir),
        output.step,
        lambda: load_recorded_tokenizer(section or {}, output.dir),
        {
            **checkpoint,
            "model_config": output.model_card.get("model_config"),
            "recipe_config": output.recipe_config,
            "tokenizer": section,
        },
    )


def _find_exported(path: Path, step: int | None) -> _Source:
    if step is not None:
        raise ValueError(
            f"`step` must be left out for an exported model, but is {step} for '{path}'"
            "."
        )

    exported = open_exported(path)

    fields = {
        "checkpoint": str(exported.dir),
        "model_config": exported.model_config,
    }

    return _Source(
        AssetCard("checkpoint", {**fields, "model_family": exported.family}),
        str(exported.dir),
        None,
        lambda: load_exported_tokenizer(exported.dir),
        {**fields, "tokenizer": str(exported.dir)},
    )


def _find_asset(name: str, step: int | None) -> _Source:
    card = _retrieve_card(name, step)

    return _Source(
        card,
        name,
        None,
        lambda: load_tokenizer(card),
        {
            "checkpoint": name,
            "model_config": _get_model_config(card),
            "tokenizer": name,
        },
    )


def _get_model_config(card: AssetCard) -> object:
    resolver = get_dependency_resolver()

    family = resolver.resolve(ModelFamily, key=get_model_family_name(card))

    return StandardValueConverter().unstructure(family.get_model_config(card))


def _retrieve_card(name: str, step: int | None) -> AssetCard:
    if step is not None:
        raise ValueError(
            f"`step` must be left out for an asset, but is {step} and '{name}' is not "
            "a directory."
        )

    store = get_asset_store()

    try:
        return store.retrieve_card(name)
    except AssetNotFoundError:
        raise ValueError(
            f"`checkpoint` must be an existing directory or a known asset, but is "
            f"'{name}' instead. `fairseq2 assets list --type model` lists the assets."
        ) from None
