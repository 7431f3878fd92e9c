"""Presets as plain values, and the data that they name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairseq2.datasets import DatasetHubAccessor
from fairseq2.utils.config import ReplaceEnvDirective, StandardConfigProcessor
from fairseq2.utils.env import StandardEnvironment
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.data.instructions import (
    MOXE_INSTRUCTIONS_FAMILY,
    InstructionsConfig,
    InstructionsDataset,
    open_instructions,
)
from moxe_plugin.data.tokens import (
    MOXE_TOKENS_FAMILY,
    TokensConfig,
    TokensDataset,
    open_tokens,
)
from moxe_plugin.report.records import Data
from moxe_plugin.train.launch import load_preset

_get_tokens_hub = DatasetHubAccessor(
    MOXE_TOKENS_FAMILY, kls=TokensDataset, config_kls=TokensConfig
)
_get_instructions_hub = DatasetHubAccessor(
    MOXE_INSTRUCTIONS_FAMILY, kls=InstructionsDataset, config_kls=InstructionsConfig
)


def resolve_preset(
    recipe: str, preset: str, seed: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Resolve a preset with its options.

    :param recipe: The name of the recipe.
    :param preset: The name of the preset.
    :param seed: The seed of the run.
    :param overrides: Options by dotted name; ``${env:NAME:default}`` stands for an
        environment variable, as in a preset.

    :returns: The configuration as plain values.
    """
    processor = StandardConfigProcessor([ReplaceEnvDirective(StandardEnvironment())])

    options: Any = processor.process(dict(overrides))
    options |= {"common.seed": seed, "common.no_sweep_dir": True}

    config = load_preset(preset, options, recipe=recipe)

    values: Any = StandardValueConverter().unstructure(config)
    assert isinstance(values, dict)

    return values


def describe_data(name: str, configs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Describe the data of a run; builds it if it is missing.

    :param name: What run directories call the data.
    :param configs: The run's resolved configurations by stage.

    :returns: The fields of :class:`~moxe_plugin.report.records.Data`.
    """
    section = configs["pretrain"]["dataset"]
    manifest = open_tokens_section(section).shards.manifest

    def digest(split: str) -> str:
        shards = manifest.splits[split].shards

        return hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()

    return asdict(
        Data(
            name=name,
            tokenizer_sha256=manifest.tokenizer_sha256,
            vocab_size=manifest.vocab_size,
            train_sha256=digest(section["train_split"]),
            valid_sha256=digest(section["valid_split"]),
        )
    )


def open_tokens_section(section: Mapping[str, Any]) -> TokensDataset:
    """Open the tokens that a recipe's ``dataset`` section names.

    :param section: The section.

    :returns: The tokens.
    """
    if section["path"] is not None:
        return open_tokens(TokensConfig(path=Path(section["path"])))

    return _get_tokens_hub().open_dataset(section["name"])


def open_instructions_section(section: Mapping[str, Any]) -> InstructionsDataset:
    """Open the instructions that a recipe's ``dataset`` section names.

    :param section: The section.

    :returns: The instructions.
    """
    if section["path"] is not None:
        return open_instructions(InstructionsConfig(path=Path(section["path"])))

    return _get_instructions_hub().open_dataset(section["name"])
