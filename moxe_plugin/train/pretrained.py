"""The configuration section that says which trained model a recipe starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fairseq2.recipe.config import (
    CommonSection,
    ModelSection,
    ReferenceModelSection,
    TokenizerSection,
)
from fairseq2.recipe.error import RecipeError

from moxe_plugin.train.output_dir import find_trained_model


@dataclass(kw_only=True)
class PretrainedSection:
    """A trained model and its tokenizer; ``--from`` and ``--step`` set it."""

    source: str | None = None
    """The output directory of a training run, or the name of a model asset. ``None``
    leaves the sections ``model`` and ``tokenizer`` as they are."""

    step: int | None = None
    """The training step of the checkpoint; ``None`` means the last one."""


def apply_pretrained(
    section: PretrainedSection,
    model: ModelSection | ReferenceModelSection,
    tokenizer: TokenizerSection,
    common: CommonSection,
) -> None:
    """Point the sections of a recipe to a trained model.

    :param section: The trained model.
    :param model: Gets the name of the model's asset.
    :param tokenizer: Becomes the tokenizer that the model was trained with.
    :param common: Gets the directory with the checkpoints, if it is a training run.

    :raises RecipeError: There is no such checkpoint.
    """
    source = section.source
    if source is None:
        return

    model.path = None

    if _is_asset_name(source):
        if section.step is not None:
            raise RecipeError(
                "`pretrained.step` must be null for an asset, but is "
                f"{section.step} for '{source}', which is not a directory."
            )

        model.name = tokenizer.name = source
        tokenizer.path = None

        return

    trained_model = find_trained_model(Path(source), section.step)

    model.name = trained_model.name

    path = trained_model.tokenizer["path"]

    tokenizer.name = trained_model.tokenizer["name"]
    tokenizer.path = None if path is None else Path(path)
    tokenizer.family = trained_model.tokenizer["family"]
    tokenizer.config_overrides = trained_model.tokenizer["config_overrides"]

    common.assets.prev_checkpoint_dir = trained_model.checkpoint_dir


def _is_asset_name(source: str) -> bool:
    looks_like_path = "/" in source or source.startswith(".")

    return not looks_like_path and not Path(source).exists()
