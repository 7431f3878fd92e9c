"""Runs every preset of `lm pretrain`, each system at its `tiny` size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from moxe_plugin.cli import main
from moxe_plugin.train.launch import load_preset
from moxe_plugin.train.pretrain import LMPretrainConfig
from moxe_plugin.train.registry import list_presets
from tests.models.families import create_model, create_unregistered, get_arch
from tests.train.tiny_data import TWO_STEPS, TinyData, read_metrics

PRESETS = list_presets("lm/pretrain")

SYSTEMS = ["moxe", "moxe_standard", "moxe_gamma0", "moxe_no_group_loss", "moxe_ffn"]
SYSTEMS += ["moxe_mlstm", "moxe_slstm", "gemma2", "qwen_moe", "xlstm"]
"""The paper's, and gamma = 0 beside MoxE-Standard, with which its code confuses it."""

# Feed-forward experts have no memory to take away.
WITH_MEMORY = [s for s in SYSTEMS if s.startswith("moxe") and s != "moxe_ffn"]


def _load(preset: str) -> LMPretrainConfig:
    config = load_preset(preset)
    assert isinstance(config, LMPretrainConfig)

    return config


def _model_of(preset: str) -> tuple[str, str]:
    model = _load(preset).model
    assert model.family is not None
    assert model.arch is not None

    return model.family, model.arch


def _to_tiny(arch: str) -> str:
    size, *parts = arch.split("_")
    assert size in ("338m", "340m", "350m", "356m", "small", "quickstart", "tiny")

    return "_".join(["tiny", *parts])


@pytest.mark.parametrize("size", ["quickstart", "paper"])
def test_every_system_of_the_paper_has_a_preset(size: str) -> None:
    names = [*SYSTEMS, *(f"{system}_token" for system in WITH_MEMORY), "moxe_dense"]

    assert {f"{size}/{name}" for name in names} <= set(PRESETS)


def test_every_system_has_a_preset_of_the_small_size() -> None:
    expected = [f"small/{name}" for name in (*SYSTEMS, "moxe_token")]

    assert [p for p in PRESETS if p.startswith("small/")] == sorted(expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains(tiny_data: TinyData, tmp_path: Path, preset: str) -> None:
    family, arch = _model_of(preset)
    overrides = {
        **tiny_data.pretrain_overrides,
        "model.arch": _to_tiny(arch),
        "model.config_overrides": "{_set_: {pad_idx: 1}}",
        "dataset.max_num_valid_batches": 1,
        **TWO_STEPS,
    }
    values = [f"{key}={'null' if v is None else v}" for key, v in overrides.items()]

    args = ["lm", "pretrain", str(tmp_path), "--preset", preset, "--no-exit-on-error"]
    assert main([*args, "--config", *values]) == 0

    recorded = YAML(typ="safe", pure=True).load(tmp_path / "config.yaml")["model"]
    assert (recorded["family"], recorded["arch"]) == (family, _to_tiny(arch))

    losses = [m["NLL Loss"] for m in read_metrics(tmp_path, "train")]
    losses += [m["NLL Loss"] for m in read_metrics(tmp_path, "valid")]
    assert len(losses) == 3
    assert losses == pytest.approx([math.log(320)] * 3, rel=0.25)


@pytest.mark.parametrize("preset", [p for p in PRESETS if "/" in p])
def test_presets_of_a_size_differ_in_the_model_and_its_optimizer_only(
    preset: str,
) -> None:
    moxe = _load(f"{preset.partition('/')[0]}/moxe")
    config = _load(preset)

    # Among MoxE and its ablations, the learning rate is the same too.
    same_optimizer = config.model.family == "moxe"
    optimizer = config.optimizer if same_optimizer else moxe.optimizer

    assert replace(config, model=moxe.model, optimizer=optimizer) == moxe


def test_no_two_presets_train_the_same_model() -> None:
    models = [repr(_load(preset).model) for preset in PRESETS]

    assert len(set(models)) == len(models)


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.parametrize("preset", [p for p in PRESETS if "/" in p])
def test_systems_are_within_5_percent_of_the_parameters_of_moxe(preset: str) -> None:
    size = preset.partition("/")[0]

    assert _count(preset) == pytest.approx(_count(f"{size}/moxe"), rel=0.05)


def _count(preset: str) -> int:
    family, arch = _model_of(preset)
    assert get_arch(family, arch) is not None

    if family in ("moxe", "xlstm"):
        model = create_model(family, arch, meta=True)
    else:
        # fairseq2 makes no modules of transformers on the meta device.
        with torch.device("meta"):
            model = create_unregistered(family, arch)

    return sum(p.numel() for p in model.parameters())
