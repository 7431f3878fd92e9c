"""Presets as plain values, and the data that they name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fairseq2.datasets import DatasetHubAccessor
from fairseq2.recipe.error import RecipeError
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.bench.corpus import expand, find_file
from moxe_plugin.bench.suite import SuiteError, Task
from moxe_plugin.data.instructions import (
    MOXE_INSTRUCTIONS_FAMILY,
    InstructionsConfig,
    InstructionsDataset,
    open_instructions,
)
from moxe_plugin.data.manifest import compute_sha256
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
    options: Any = expand(dict(overrides))
    options |= {"common.seed": seed, "common.no_sweep_dir": True}

    config = load_preset(preset, options, recipe=recipe)

    values: Any = StandardValueConverter().unstructure(config)
    assert isinstance(values, dict)

    return values


def resolve_tasks(tasks: Sequence[Task]) -> list[Any]:
    """Write down tasks as plain values.

    :param tasks: The tasks.

    :returns: The name of a task that has nothing else; otherwise what differs from the
        defaults, with the whole path and the hash of a file.

    :raises SuiteError: There is no such file.
    """
    return [_resolve_task(task) for task in tasks]


def _resolve_task(task: Task) -> str | dict[str, Any]:
    options: dict[str, Any] = {
        field.name: value
        for field in fields(task)
        if (value := getattr(task, field.name)) and value != field.default
    }

    if task.file is not None:
        way_out = "take the task out of the suite."
        file = find_file(task.file, f"`file` of the task {task.task}", way_out)

        options |= {"file": str(file), "file_sha256": compute_sha256(file)}

    if task.arguments:
        options["arguments"] = expand(dict(task.arguments))

    return options if options.keys() != {"task"} else task.task


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


def check_instructions(preset: str, config: Mapping[str, Any]) -> None:
    """Make sure before anything is trained that the instructions are there.

    :param preset: The preset of the finetuning.
    :param config: Its resolved configuration.

    :raises SuiteError: They are not, or lack a split.
    """
    section = config["dataset"]

    try:
        splits = open_instructions_section(section).splits
    except RecipeError as ex:
        raise SuiteError(
            f"The instructions of `{preset}` cannot be read: {ex} Presets read them "
            "below the directory that MOXE_DATA_DIR names; `finetune_config` of the "
            "suite can set another `dataset.path`."
        ) from ex

    for name in (section["train_split"], section["valid_split"]):
        if name not in splits:
            raise SuiteError(
                f"The instructions of `{preset}` in '{section['path']}' must have the "
                f"split `{name}`, but have {', '.join(splits)} only."
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
