"""Tests of moxe_plugin/export: what is written, and that it comes back as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.nn import BatchLayout
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from moxe_plugin.cli import moxe_main
from moxe_plugin.data.tokenizer import HgTextTokenizer
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.export.exporting import export_checkpoint
from tests.eval.test_checkpoints import write_checkpoint
from tests.hf.conftest import Export
from tests.models.families import FAMILIES, random_ids

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("some text").input_ids) == "some text"
    # What `generate` takes as it is
    assert set(tokenizer("some text")) == {"input_ids", "attention_mask"}

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, logits = torch.load(folder + ".pt")
    with torch.no_grad():
        difference = (model(ids).logits - logits).abs().max()
    print(type(model).__name__, float(difference) < 1e-5)

load(sys.argv[1])
load(sys.argv[2])
assert "moxe_plugin" not in sys.modules

import moxe_plugin.hf
assert "fairseq2" not in sys.modules

load(sys.argv[3])
load(sys.argv[4])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_comes_back_bit_by_bit(export: Export, family: str) -> None:
    _, folder, loaded = export(family)

    again = load_checkpoint(folder)

    states = loaded.model.state_dict(), again.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    tokenizers = loaded.tokenizer, again.tokenizer
    assert tokenizers[0].vocab_info == tokenizers[1].vocab_info
    assert isinstance(tokenizers[0], HgTextTokenizer)
    assert isinstance(tokenizers[1], HgTextTokenizer)
    assert tokenizers[0].sha256 == tokenizers[1].sha256

    assert (again.name, again.step) == (str(folder), None)
    for key in ("model_config", "model_family"):
        assert again.provenance[key] == loaded.provenance[key]

    with pytest.raises(ValueError, match="`step` must be left out for an exported"):
        load_checkpoint(folder, step=3)


def test_auto_classes_load_it_in_another_process(export: Export) -> None:
    folders = []

    for family in ("gemma2", "qwen_moe", "moxe", "xlstm"):
        _, folder, loaded = export(family)

        ids = random_ids(3, 20)
        with torch.no_grad():
            logits = loaded.model(ids, BatchLayout.of(ids))

        torch.save((ids, logits), f"{folder}.pt")
        folders.append(str(folder))

    result = subprocess.run(
        [sys.executable, "-c", LOAD, *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

    assert result.stdout.splitlines() == [
        "Gemma2ForCausalLM True",
        "Qwen2MoeForCausalLM True",
        "MoxEForCausalLM True",
        "XLSTMForCausalLM True",
    ]


def _drop(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def _change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _break_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        (
            "moxe",
            lambda f: _drop(f, lambda s: s.pop("model.final_proj.weight")),
            r"has 'model\.final_proj\.weight' missing\.",
        ),
        (
            "gemma2",
            lambda f: _drop(f, lambda s: s.update(lm_head=torch.zeros(1))),
            r"has 'lm_head' unknown\.",
        ),
        (
            "xlstm",
            lambda f: _drop(
                f, lambda s: s.update({"model.final_proj.weight": torch.zeros(2, 3)})
            ),
            r"'model\.final_proj\.weight' of shape \(2, 3\) instead of \(320, 32\)",
        ),
        ("moxe", _break_weights, "is not a safetensors file"),
        (
            "moxe",
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "must hold the parameters in safetensors files",
        ),
        ("moxe", lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (
            "moxe",
            lambda f: _change_config(f, model_type="llama"),
            "must be one of moxe, moxe_xlstm, gemma2, qwen2_moe, but is 'llama'",
        ),
        (
            "moxe",
            lambda f: _change_config(f, model_config={"top_q": 2}),
            "extra key.* top_q",
        ),
        (
            "moxe",
            lambda f: _change_config(f, model_config={"top_k": 99}),
            "`top_k` must be",
        ),
        (
            "gemma2",
            lambda f: _change_config(f, final_logit_softcapping=20.0),
            "`final_logit_softcapping` must be 30.0 in family 'gemma2', but is 20.0",
        ),
        (
            "xlstm",
            lambda f: (f / "tokenizer.json").unlink(),
            "`tokenizer` must be given, because .* has no tokenizer.json",
        ),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "truncated",
        "pickle",
        "no_json",
        "other_model",
        "unknown_field",
        "wrong_value",
        "other_gemma2",
        "no_tokenizer",
    ],
)
def test_damaged_folders_are_refused(
    export: Export,
    tmp_path: Path,
    family: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(export(family).folder, folder)
    damage(folder)

    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_the_card_says_how_the_model_was_trained(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(export("moxe").run_dir, run_dir)

    recipe = {
        **YAML(typ="safe", pure=True).load(run_dir / "config.yaml"),
        "model": {"dtype": "float32"},
        "dataset": {"name": "moxe_embedded", "seq_len": 128},
        "optimizer": {"name": "adamw", "config": {"lr": 0.008}},
        "common": {"seed": 5},
    }
    YAML(typ="safe", pure=True).dump(recipe, run_dir / "config.yaml")

    metrics: dict[str, list[dict[str, float]]] = {
        "train": [
            {"Step": s, "Total Number of Target Elements": s * 10} for s in (3, 4)
        ],
        "valid": [{"Step": s, "NLL Loss": s + 0.25} for s in (2, 3)],
    }
    run_dir.joinpath("metrics").mkdir()
    for name, lines in metrics.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        run_dir.joinpath(f"metrics/{name}.jsonl").write_text(text)

    record = _write_record(tmp_path, export, seed=5)

    out = tmp_path / "out"
    argv = ["export", str(run_dir), str(out), "--record", str(record), "--json"]
    assert moxe_main(argv) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(out)
    assert document["checkpoint"] == str(run_dir)
    assert set(document["files"]) == {file.name for file in out.iterdir()}

    card = out.joinpath("README.md").read_text()
    num_parameters = sum(p.numel() for p in export("moxe").loaded.model.parameters())

    for line in (
        "license: apache-2.0",
        f"# MoxE, {num_parameters:,} parameters",
        "| num_experts | 4 |",
        "| step | 3 |",
        "| target tokens | 30 |",
        "| data | moxe_embedded |",
        "| sequence length | 128 |",
        "| learning rate | 0.008 |",
        "| seed | 5 |",
        "| code of the training | moxe_plugin 0.1.0, commit 0123 |",
        "| torch | 2.9.1 |",
        "| validation split 'valid' | NLL Loss | 3.25 |",
        "| some_task | acc | 0.25 |",
        "import moxe_plugin.hf",
    ):
        assert line in card.splitlines() or line in card

    assert "2.25" not in card
    assert "other_task" not in card

    assert YAML(typ="safe", pure=True).load(out / "recipe.yaml") == recipe

    other = _write_record(tmp_path, export, seed=6)
    with pytest.raises(ValueError, match="must be the record of the exported model"):
        export_checkpoint(run_dir, tmp_path / "other", run_dir=other)
    assert not (tmp_path / "other").exists()


def _write_record(directory: Path, export: Export, *, seed: int) -> Path:
    loaded = export("moxe").loaded
    record = directory / f"record_{seed}"
    record.mkdir()

    scores = {
        "eval_pretrained": ("some_task", 3),
        "eval_later": ("other_task", 4),
    }
    files: dict[str, object] = {
        name: {
            "config": {"model_name": "/elsewhere/run", "model_step": step},
            "results": {task: {"alias": task, "acc,none": 0.25, "sample_len": 8}},
        }
        for name, (task, step) in scores.items()
    }
    files["model"] = {
        "schema_version": 1,
        "family": "moxe",
        "arch": "tiny",
        "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "num_active_parameters": 1,
    }
    files["environment"] = {
        "schema_version": 1,
        "kind": "trained",
        "suite": "smoke",
        "system": "moxe",
        "label": "MoxE",
        "seed": seed,
        "config_sha256": "a",
        "recipe_sha256": "b",
        "hardware": {
            "name": "cpu1",
            "device": "cpu",
            "model": "A processor",
            "num_threads": 1,
            "num_jobs": 1,
        },
        "code": {"version": "0.1.0", "commit": "0123", "dirty": False},
        "versions": {"torch": "2.9.1"},
        "data": {
            "name": "embedded",
            "tokenizer_sha256": "c",
            "vocab_size": 260,
            "train_sha256": "d",
            "valid_sha256": "e",
        },
        "training_tokens": 30,
        "finetuning_tokens": None,
        "throughput_tokens_per_s": 1.0,
        "peak_memory_gib": 1.0,
        "wall_s": {"pretrain": 1.0},
    }

    for name, content in files.items():
        record.joinpath(f"{name}.json").write_text(json.dumps(content))
    for name in ("train", "valid"):
        record.joinpath(f"{name}.jsonl").touch()

    return record


def test_a_card_without_records_says_so(export: Export) -> None:
    card = export("gemma2").folder.joinpath("README.md").read_text()

    assert "None are recorded." in card
    assert "moxe_plugin.hf" not in card


def test_nothing_is_overwritten(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, folder, _ = export("moxe")

    assert moxe_main(["export", str(run_dir), str(folder)]) == 2
    assert "`out_dir` must be empty" in capsys.readouterr().err

    assert moxe_main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "is an exported model already" in capsys.readouterr().err

    assert moxe_main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is not the output directory of a training run" in capsys.readouterr().err


def test_the_tokenizer_adds_no_special_tokens_by_itself(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "run", tmp_path / "out"
    write_checkpoint(run_dir, "xlstm", steps=(1,))

    file = run_dir / "tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>",
                "ids": [0],
                "tokens": ["<|endoftext|>"],
            }
        },
    }
    file.write_text(json.dumps(tokenizer))

    export_checkpoint(run_dir, folder)

    exported = load_checkpoint(folder).tokenizer
    assert isinstance(exported, HgTextTokenizer)
    raw = exported.create_raw_encoder()("some text").tolist()

    assert exported.hg_tokenizer.encode("some text") == raw
    assert exported.hg_tokenizer.padding_side == "left"
