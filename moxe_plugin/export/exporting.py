"""Writes the folder of an exported model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from fairseq2.models.hg import (
    HuggingFaceConfig,
    get_hugging_face_converter,
    save_hugging_face_model,
)
from ruamel.yaml import YAML
from transformers import GenerationConfig

from moxe_plugin.eval.checkpoints import LoadedModel, load_checkpoint
from moxe_plugin.export.facts import collect_facts
from moxe_plugin.export.model_card import render_model_card
from moxe_plugin.export.tokenizer_files import SpecialTokens, write_tokenizer
from moxe_plugin.hf.families import HF_FAMILIES, structure_family_config
from moxe_plugin.hf.folder import CONFIG_FILE, is_exported, open_exported
from moxe_plugin.models.train_output import open_train_output

NUM_PARTS: Final = 3
"""Reading, writing, checking."""


def export_checkpoint(
    path_or_asset: str | Path,
    out_dir: Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    run_dir: Path | None = None,
    license_id: str = "apache-2.0",
    on_part: Callable[[], None] = lambda: None,
) -> None:
    """Write a trained model for transformers.

    The folder appears when all of it is written and checked.

    :param path_or_asset: As for
        :func:`~moxe_plugin.eval.checkpoints.load_checkpoint`, but not an exported
        model.
    :param out_dir: The folder; it must not exist, or be empty.
    :param step: The training step; the last one by default.
    :param tokenizer: Instead of the tokenizer of the training run: an asset name, or a
        directory with a Hugging Face tokenizer.
    :param run_dir: The record of the run, for the model card.
    :param license_id: The licence of the weights.
    :param on_part: Called after each of :data:`NUM_PARTS` parts of the work.

    :raises ValueError: There is no such checkpoint or tokenizer, ``out_dir`` holds
        something, or ``run_dir`` is the record of another model.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"`out_dir` must be empty, but '{out_dir}' is not.")

    if above := next(
        (p for p in out_dir.parents if p.exists() and not p.is_dir()), None
    ):
        raise ValueError(
            f"`out_dir` must be below a directory, but '{above}' is a file. Choose "
            "another one."
        )

    if is_exported(Path(path_or_asset)):
        raise ValueError(f"'{path_or_asset}' is an exported model already.")

    loaded = load_checkpoint(
        path_or_asset,
        step=step,
        dtype=_find_dtype(path_or_asset, step),
        tokenizer=tokenizer,
    )

    family = loaded.provenance["model_family"]
    if family not in HF_FAMILIES:
        raise ValueError(
            f"'{path_or_asset}' must be of one of the families "
            f"{', '.join(HF_FAMILIES)} to be exported, but is of '{family}'."
        )

    facts = collect_facts(loaded, run_dir)
    on_part()

    out_dir.parent.mkdir(parents=True, exist_ok=True)

    with TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}_") as name:
        # A temporary directory itself is closed to other users.
        folder = Path(name) / out_dir.name
        folder.mkdir()

        special = write_tokenizer(loaded.tokenizer, folder, loaded.model.max_seq_len)

        _write_model(loaded, family, special, folder)
        on_part()

        card = render_model_card(facts, license_id=license_id)
        (folder / "README.md").write_text(card, encoding="utf-8")

        if facts.recipe_config:
            _write_yaml(facts.recipe_config, folder / "recipe.yaml")

        open_exported(folder)
        on_part()

        if out_dir.exists():
            out_dir.rmdir()

        folder.rename(out_dir)


def _find_dtype(path_or_asset: str | Path, step: int | None) -> torch.dtype:
    """Find the type in which the parameters were trained."""
    if not Path(path_or_asset).is_dir():
        return torch.float32

    output = open_train_output(Path(path_or_asset), step)

    section = output.recipe_config.get("model") or {}

    dtype = getattr(torch, section.get("dtype", "float32"))
    assert isinstance(dtype, torch.dtype)

    return dtype


def _write_model(
    loaded: LoadedModel, family: str, special: SpecialTokens, folder: Path
) -> None:
    converter = get_hugging_face_converter(family)

    config = structure_family_config(family, loaded.provenance["model_config"])
    hf_config = converter.to_hg_config(config)

    dtype = next(loaded.model.parameters()).dtype

    data = {
        **hf_config.data,
        "bos_token_id": special.bos_idx,
        "eos_token_id": special.eos_idx,
        "dtype": dtype,
    }

    save_hugging_face_model(
        folder,
        converter.to_hg_state_dict(loaded.model.state_dict(), config),
        HuggingFaceConfig(data, hf_config.kls_name, hf_config.arch),
    )

    if HF_FAMILIES[family].fields:
        _keep_attention(folder / CONFIG_FILE, family, config)

    GenerationConfig(
        bos_token_id=special.bos_idx,
        eos_token_id=special.eos_idx,
        pad_token_id=special.pad_idx,
    ).save_pretrained(folder)


def _keep_attention(file: Path, family: str, config: Any) -> None:
    # transformers reads this name but does not write it, and its own choice for Gemma 2
    # does not cap the logits of attention.
    hf_config = HF_FAMILIES[family].create_hf_config(config)

    values = json.loads(file.read_text(encoding="utf-8"))
    values["_attn_implementation"] = hf_config._attn_implementation

    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_yaml(values: Mapping[str, Any], file: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False

    yaml.dump(dict(values), file)
