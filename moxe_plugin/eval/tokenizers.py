"""Load the tokenizer of a model: as named, as recorded or as exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq2.data.tokenizers import (
    Tokenizer,
    TokenizerFamily,
    TokenizerFamilyNotKnownError,
    TokenizerModelError,
    TokenizerNotKnownError,
    load_tokenizer,
)
from fairseq2.device import CPU
from fairseq2.gang import create_fake_gangs
from fairseq2.runtime.dependency import DependencyLookup, get_dependency_resolver
from fairseq2.utils.config import StandardConfigMerger
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.data.tokenizer import MOXE_HG_TOKENIZER_FAMILY, TOKENIZER_FILE


def load_named_tokenizer(tokenizer: str | Path | Tokenizer) -> Tokenizer:
    """Load the tokenizer that a user names.

    :param tokenizer: An asset name, a directory with a Hugging Face tokenizer, or a
        tokenizer.

    :returns: The tokenizer.

    :raises ValueError: There is none.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer

    if Path(tokenizer).is_dir():
        return _load_custom_tokenizer(Path(tokenizer), MOXE_HG_TOKENIZER_FAMILY, None)

    try:
        return load_tokenizer(str(tokenizer))
    except TokenizerNotKnownError:
        raise ValueError(
            f"`tokenizer` must be an existing directory or a known asset, but is "
            f"'{tokenizer}' instead."
        ) from None


def load_recorded_tokenizer(section: Mapping[str, Any], run_dir: Path) -> Tokenizer:
    """Load the tokenizer of a training run.

    :param section: The ``tokenizer`` section of the run's configuration.
    :param run_dir: The directory of the run, for error messages.

    :returns: The tokenizer.

    :raises ValueError: The section is empty, its path is gone, or it changes the
        configuration of an asset.
    """
    if not section:
        raise ValueError(
            f"`tokenizer` must be given, because '{run_dir}' records none in its "
            "`config.yaml`."
        )

    overrides = section.get("config_overrides")

    if (path := section.get("path")) is not None:
        if not Path(path).exists():
            raise ValueError(
                f"`tokenizer` must be given, because the tokenizer that '{run_dir}' "
                f"was trained with is no longer at '{path}'."
            )

        return _load_custom_tokenizer(Path(path), section["family"], overrides)

    if overrides:
        raise ValueError(
            "`tokenizer` must be given, because a tokenizer recorded by `name` with "
            f"`config_overrides` cannot be rebuilt. '{run_dir}' has one."
        )

    return load_tokenizer(section["name"])


def load_exported_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in the folder of an exported model.

    :param path: The folder.

    :returns: The tokenizer.

    :raises ValueError: There is none; fairseq2 itself writes none.
    """
    if not (path / TOKENIZER_FILE).is_file():
        raise ValueError(
            f"`tokenizer` must be given, because '{path}' has no {TOKENIZER_FILE}."
        )

    return _load_custom_tokenizer(path, MOXE_HG_TOKENIZER_FAMILY, None)


def _load_custom_tokenizer(
    path: Path, family_name: str, overrides: object
) -> Tokenizer:
    families = DependencyLookup(get_dependency_resolver(), TokenizerFamily)

    family = families.maybe_get(family_name)
    if family is None:
        raise TokenizerFamilyNotKnownError(family_name)

    config = family.config_kls()

    if overrides:
        converter = StandardValueConverter()
        merged = StandardConfigMerger().merge(converter.unstructure(config), overrides)
        config = converter.structure(merged, family.config_kls)

    try:
        return family.load_custom_tokenizer(path, config, create_fake_gangs(CPU))
    except (TokenizerModelError, FileNotFoundError) as ex:
        raise ValueError(f"`tokenizer` cannot be loaded: {ex}") from ex
