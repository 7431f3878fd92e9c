"""Uses a checkpoint of the authors' code in a recipe, by the name of its asset card."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moxe_plugin.models.interop import AuthorsCheckpointError
from moxe_plugin.train.launch import load_preset, run_recipe
from tests.models.authors import CARD_NAME, write_card_of_the_authors
from tests.train.tiny_data import TWO_STEPS, TinyData, read_metrics

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


def _generate(output_dir: Path) -> None:
    overrides = {
        "pretrained.source": CARD_NAME,
        "prompts": ["some text"],
        "seq_generator.config.max_gen_len": 4,
        "common.torch.num_threads": 1,
    }
    config = load_preset("generate/greedy", overrides, recipe="lm/generate")

    run_recipe("lm/generate", config, output_dir, quiet=True)


def test_checkpoint_of_the_authors_is_finetuned(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card_of_the_authors(tmp_path / "cards")
    monkeypatch.setenv("FAIRSEQ2_USER_ASSET_DIR", str(tmp_path / "cards"))

    overrides = {
        **tiny_data.finetune_overrides,
        "pretrained.source": CARD_NAME,
        **TWO_STEPS,
    }
    config = load_preset(
        "instruct/quickstart", overrides, recipe="lm/instruction_finetune"
    )
    run_recipe("lm/instruction_finetune", config, tmp_path / "out", quiet=True)

    losses = [m["NLL Loss"] for m in read_metrics(tmp_path / "out", "train")]
    assert losses == pytest.approx([math.log(320)] * 2, rel=0.25)


def test_an_array_that_does_not_fit_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def reshape(theirs: dict[str, Tensor]) -> None:
        theirs["lm_head/kernel"] = torch.ones(31, 320)

    write_card_of_the_authors(tmp_path / "cards", reshape)
    monkeypatch.setenv("FAIRSEQ2_USER_ASSET_DIR", str(tmp_path / "cards"))

    with pytest.raises(AuthorsCheckpointError, match=r"has \(31, 320\) instead"):
        _generate(tmp_path / "out")

    log = capfd.readouterr().err

    assert "'lm_head/kernel' of the checkpoint must have the shape (32, 320)" in log
    assert "Traceback" not in log
