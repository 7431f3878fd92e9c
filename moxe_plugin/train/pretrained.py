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

from moxe_plugin.data.tokenizer import MOXE_HG_TOKENIZER_FAMILY
from moxe_plugin.hf.folder import is_exported, open_exported
from moxe_plugin.models.checkpoint_files import DamagedCheckpointError
from moxe_plugin.models.train_output import (
    TrainOutput,
    check_model,
    open_train_output,
)


@dataclass(kw_only=True)
class PretrainedSection:
    """A trained model and its tokenizer; ``--from`` and ``--step`` set it."""

    source: str | None = None
    """The output directory of a training run, the folder of an exported model, or the
    name of a model asset. ``None`` leaves the sections ``model`` and ``tokenizer`` as
    they are."""

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
    :raises DamagedCheckpointError: ``model.yaml`` or ``config.yaml`` is not as it was
        written.
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

    if is_exported(Path(source)):
        _apply_exported(Path(source), section.step, model, tokenizer)

        return

    output = _open(Path(source), section.step)

    recorded = output.recipe_config.get("tokenizer")
    if recorded is None:
        raise RecipeError(
            f"'{output.dir / 'config.yaml'}' must tell the tokenizer of the model, but "
            "is missing or has no section `tokenizer`."
        )

    path = recorded["path"]

    tokenizer.name = recorded["name"]
    tokenizer.path = None if path is None else Path(path)
    tokenizer.family = recorded["family"]
    tokenizer.config_overrides = recorded["config_overrides"]

    # fairseq2 gives each checkpoint in the directory a name.
    model.name = f"checkpoint_step_{output.step}"

    common.assets.prev_checkpoint_dir = output.checkpoint_dir


def check_pretrained(section: PretrainedSection) -> None:
    """Make sure that the trained model is as it was written.

    Reads its files once; the configuration, which is structured many times in a run,
    is no place for that.

    :param section: The trained model.

    :raises DamagedCheckpointError: A file of its checkpoint is not.
    """
    source = section.source

    if source is None or _is_asset_name(source) or is_exported(Path(source)):
        return

    check_model(_open(Path(source), section.step))


def _apply_exported(
    source: Path,
    step: int | None,
    model: ModelSection | ReferenceModelSection,
    tokenizer: TokenizerSection,
) -> None:
    if step is not None:
        raise RecipeError(
            f"`pretrained.step` must be null for an exported model, but is {step} for "
            f"'{source}'."
        )

    try:
        exported = open_exported(source)
    except ValueError as ex:
        # With a cause, fairseq2 logs a stack trace.
        raise RecipeError(str(ex)) from None

    model.name = None
    model.path = exported.dir
    model.family = exported.family
    model.arch = None
    model.config_overrides = exported.model_config

    tokenizer.name = None
    tokenizer.path = exported.dir
    tokenizer.family = MOXE_HG_TOKENIZER_FAMILY
    tokenizer.config_overrides = None


def _open(source: Path, step: int | None) -> TrainOutput:
    if not source.is_dir():
        raise RecipeError(
            f"`pretrained.source` must be the output directory of a training run or "
            f"the name of a model asset, but '{source}' is no directory."
        )

    try:
        return open_train_output(source, step)
    except DamagedCheckpointError:
        raise
    except ValueError as ex:
        # With a cause, fairseq2 logs a stack trace.
        raise RecipeError(str(ex)) from None


def _is_asset_name(source: str) -> bool:
    looks_like_path = "/" in source or source.startswith(".")

    return not looks_like_path and not Path(source).exists()
