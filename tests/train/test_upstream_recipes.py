"""Runs fairseq2's own recipes, unmodified, on a checkpoint of ours.

fairseq2's wheel has no recipes, so the tests need a checkout of its repository at the
tag of the installed version (v0.8.1): `MOXE_FAIRSEQ2_CHECKOUT` names it, or it lies at
`../shared/fairseq2`. Without one they are skipped.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moxe_plugin.hf.folder import open_exported
from tests.train.tiny_data import TinyData, read_metrics

_CHECKOUT = Path(
    os.environ.get(
        "MOXE_FAIRSEQ2_CHECKOUT",
        Path(__file__).parents[2].parent / "shared" / "fairseq2",
    )
)

pytestmark = pytest.mark.skipif(
    not (_CHECKOUT / "recipes" / "lm").is_dir(),
    reason="There is no checkout of fairseq2; see `MOXE_FAIRSEQ2_CHECKOUT`.",
)


def _run_module(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    output_dir: Path,
    config: Mapping[str, Any],
) -> None:
    """Do what `python -m recipes.lm.RECIPE` does in the checkout."""
    config_file = output_dir.with_suffix(".yaml")
    YAML().dump(dict(config), config_file)

    argv = [str(output_dir), "--config-file", str(config_file)]

    # Our own `recipes` has no module, and is no package.
    monkeypatch.syspath_prepend(str(_CHECKOUT))
    monkeypatch.setattr(sys, "argv", [recipe, *argv, "--no-rich", "--no-exit-on-error"])

    runpy.run_module(f"recipes.lm.{recipe}", run_name="__main__", alter_sys=False)


def _common(checkpoint_dir: Path) -> dict[str, Any]:
    return {
        "no_sweep_dir": True,
        "assets": {"prev_checkpoint_dir": str(checkpoint_dir)},
        "torch": {"num_threads": 1},
        "metric_recorders": {"tensorboard": {"enabled": False}},
    }


def _tokenizer(data: TinyData) -> dict[str, Any]:
    return {"name": None, "path": str(data.tokenizer_dir), "family": "moxe_hg"}


@pytest.fixture(scope="module")
def sft_dir(
    tiny_data: TinyData,
    pretrained_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Finetune the tiny MoxE with upstream's recipe.

    :param tiny_data: The data.
    :param pretrained_dir: The model.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory.
    """
    output_dir = tmp_path_factory.mktemp("upstream") / "sft"

    sources = {
        split: [{"path": str(tiny_data.instructions_dir / f"{split}.jsonl")}]
        for split in ("train", "valid")
    }

    config = {
        "model": {"name": "checkpoint_step_8"},
        "tokenizer": _tokenizer(tiny_data),
        "dataset": {
            "config_overrides": {"sources": {"_set_": sources}},
            "valid_split": "valid",
            "max_seq_len": 64,
            "max_num_tokens": 256,
        },
        "lr_scheduler": {"config": {"num_warmup_steps": 1}},
        # Else as upstream has it: FSDP, bf16, an exported model with each checkpoint.
        "regime": {
            "num_steps": 4,
            "validate_every_n_steps": 2,
            "checkpoint_every_n_steps": 4,
            "keep_checkpoint_every_n_steps": None,
            "publish_metrics_every_n_steps": 1,
        },
        "common": _common(pretrained_dir / "checkpoints"),
    }

    with pytest.MonkeyPatch.context() as monkeypatch:
        _run_module(monkeypatch, "sft", output_dir, config)

    return output_dir


def test_sft_trains_and_validates(sft_dir: Path) -> None:
    losses = [m["NLL Loss"] for m in read_metrics(sft_dir, "train")]

    assert len(losses) == 4
    assert all(0.0 < loss < 8.0 for loss in losses)
    assert losses[-1] < losses[0]

    assert [m["Step"] for m in read_metrics(sft_dir, "valid")] == [2, 4]


def test_sft_exports_a_model_for_transformers(sft_dir: Path) -> None:
    folder = sft_dir / "checkpoints" / "step_4" / "hg"

    exported = open_exported(folder)

    assert exported.family == "moxe"
    assert (folder / "model.safetensors").is_file()


def test_generate_completes_prompts(
    sft_dir: Path,
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": n, "src": f"Double {n}. "}) + "\n" for n in range(3))
    )

    config = {
        "model": {"name": "checkpoint_step_4", "dtype": "float32"},
        "tokenizer": _tokenizer(tiny_data),
        "dataset": {
            "config_overrides": {"paths": [str(prompts)]},
            "batch_size": 2,
        },
        "seq_generator": {"config": {"max_gen_len": 6}},
        "common": _common(sft_dir / "checkpoints"),
    }

    _run_module(monkeypatch, "generate", tmp_path / "out", config)

    lines = (tmp_path / "out" / "output" / "rank_0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]

    assert [r["prompt"] for r in records] == [f"Double {n}. " for n in range(3)]
    assert all(1 <= len(r["token_indices"]) <= 7 for r in records)
