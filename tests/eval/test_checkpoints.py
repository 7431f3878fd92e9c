"""Tests of moxe_plugin/eval/checkpoints.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout
from fairseq2.utils.structured import StandardValueConverter
from ruamel.yaml import YAML

from moxe_plugin.allocator import is_freed_memory_kept
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.eval.harness import MoxeHarnessLM
from tests.common import ByteTokenizer
from tests.models.families import create_model, get_arch

FAMILIES = ["moxe", "gemma2"]


def write_checkpoint(
    output_dir: Path, family: str, *, steps: tuple[int, ...] = (2, 10)
) -> dict[int, CausalLM]:
    """Write what a training run leaves behind, in fairseq2's layout."""
    models: dict[int, CausalLM] = {}

    for step in steps:
        torch.manual_seed(step)
        models[step] = create_model(family, dtype=torch.float32).eval()

        file = output_dir / f"checkpoints/step_{step}/model/pp_00/tp_00/sdp_00.pt"
        file.parent.mkdir(parents=True)
        torch.save(models[step].state_dict(), file)

    card = {
        "name": "checkpoint",
        "model_family": family,
        "model_config": StandardValueConverter().unstructure(get_arch(family, "tiny")),
    }
    YAML(typ="safe", pure=True).dump(card, output_dir / "checkpoints/model.yaml")

    tokenizer_dir = output_dir / "tokenizer"
    train_bpe(["some text to learn from"] * 4, 260, tokenizer_dir)

    config = {"tokenizer": {"path": str(tokenizer_dir), "family": "moxe_hg"}}
    YAML(typ="safe", pure=True).dump(config, output_dir / "config.yaml")

    return models


def compute_logits(model: CausalLM) -> torch.Tensor:
    """Run a model on a few tokens."""
    seqs = torch.arange(12).reshape(2, 6)

    with torch.no_grad():
        logits = model(seqs, BatchLayout.of(seqs))
    assert isinstance(logits, torch.Tensor)

    return logits


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loaded_model_is_the_saved_one(tmp_path: Path, family: str) -> None:
    models = write_checkpoint(tmp_path, family)

    last = load_checkpoint(tmp_path)
    first = load_checkpoint(str(tmp_path), step=2)

    assert (last.step, first.step) == (10, 2)
    assert not last.model.training
    assert torch.equal(compute_logits(last.model), compute_logits(models[10]))
    assert torch.equal(compute_logits(first.model), compute_logits(models[2]))

    assert last.provenance["model_family"] == family
    assert last.provenance["checkpoint"] == str(tmp_path / "checkpoints/step_10/model")
    assert last.tokenizer.vocab_info.bos_idx == 0


@pytest.mark.usefixtures("fairseq2_setup")
def test_the_harness_loads_by_argument_string(tmp_path: Path) -> None:
    models = write_checkpoint(tmp_path, "xlstm")

    lm = MoxeHarnessLM.create_from_arg_string(
        f"checkpoint={tmp_path},step=2,dtype=float64",
        {"batch_size": 3, "max_batch_size": None, "device": None},
    )
    info = lm.get_model_info()

    assert info["model_step"] == 2
    assert info["model_dtype"] == "torch.float64"
    assert info["model_num_parameters"] == sum(
        p.numel() for p in models[2].parameters()
    )


@pytest.mark.usefixtures("fairseq2_setup")
def test_another_tokenizer_can_be_given(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "xlstm", steps=(1,))
    other_dir = tmp_path / "other"
    train_bpe(["different text"], 300, other_dir)
    tmp_path.joinpath("config.yaml").unlink()

    by_path = load_checkpoint(tmp_path, tokenizer=str(other_dir))
    by_object = load_checkpoint(tmp_path, tokenizer=ByteTokenizer())

    assert by_path.tokenizer.vocab_info.bos_idx == 0
    assert isinstance(by_object.tokenizer, ByteTokenizer)

    with pytest.raises(ValueError, match="`tokenizer` must be given, because"):
        load_checkpoint(tmp_path)

    with pytest.raises(ValueError, match="`tokenizer` must be an existing directory"):
        load_checkpoint(tmp_path, tokenizer="nothing")


@pytest.mark.usefixtures("fairseq2_setup")
def test_a_moved_tokenizer_is_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "xlstm", steps=(1,))
    tmp_path.joinpath("tokenizer").rename(tmp_path / "moved")

    with pytest.raises(ValueError, match=r"is no longer at '.*tokenizer'"):
        load_checkpoint(tmp_path)


@pytest.mark.usefixtures("fairseq2_setup")
def test_an_unknown_asset_is_reported() -> None:
    message = "must be an existing directory or a known asset, but is 'no_such_model'"

    with pytest.raises(ValueError, match=message):
        load_checkpoint("no_such_model")

    with pytest.raises(ValueError, match="`step` must be left out for an asset"):
        load_checkpoint("no_such_model", step=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Exactly one of `checkpoint` and `model` must be given"),
        ({"checkpoint": "a", "model": "b"}, "Exactly one of"),
        ({"checkpoint": "a", "dtype": "int8"}, "`dtype` must be one of float32"),
        ({"checkpoint": "a", "device": "gpu"}, "`device` must be cpu, cuda or"),
        ({"checkpoint": "a", "foo": 1}, "`foo` must not be given.* batch_size, max_"),
    ],
)
def test_a_wrong_harness_argument_is_explained(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MoxeHarnessLM(**options)


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_command_line_default_of_cuda_falls_back_to_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, "xlstm", steps=(1,))

    lm = MoxeHarnessLM(checkpoint=str(tmp_path), device="cuda:0")

    assert lm.get_model_info()["model_device"] == "cpu"
    assert "CUDA is not available" in caplog.text
    assert is_freed_memory_kept()
