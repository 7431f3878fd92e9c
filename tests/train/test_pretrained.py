"""Checks how the sections of a recipe are pointed to a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
from fairseq2.recipe.config import CommonSection, ModelSection, TokenizerSection
from fairseq2.recipe.error import RecipeError

from moxe_plugin.train.pretrained import PretrainedSection, apply_pretrained


def _make_run(run_dir: Path) -> None:
    for step in (4, 10):
        run_dir.joinpath(f"checkpoints/step_{step}/model").mkdir(parents=True)

    run_dir.joinpath("checkpoints", "model.yaml").write_text("model_family: moxe")
    run_dir.joinpath("config.yaml").write_text(
        "tokenizer: {name: null, path: /tok, family: moxe_hg, config_overrides: {a: 1}}"
    )


@pytest.mark.parametrize(
    ("path", "step", "expected"),
    [
        ("", None, "checkpoint_step_10"),
        ("", 4, "checkpoint_step_4"),
        ("checkpoints/step_4", None, "checkpoint_step_4"),
    ],
)
def test_training_run_gives_model_and_tokenizer(
    tmp_path: Path, path: str, step: int | None, expected: str
) -> None:
    _make_run(tmp_path)

    model, tokenizer, common = ModelSection(), TokenizerSection(), CommonSection()
    model.path = tmp_path
    tokenizer.name = "foo"

    section = PretrainedSection(source=str(tmp_path / path), step=step)

    apply_pretrained(section, model, tokenizer, common)

    assert model == ModelSection(name=expected)
    assert tokenizer == TokenizerSection(
        name=None, path=Path("/tok"), family="moxe_hg", config_overrides={"a": 1}
    )
    assert common.assets.prev_checkpoint_dir == tmp_path / "checkpoints"


def test_asset_gives_model_and_tokenizer() -> None:
    model, tokenizer, common = ModelSection(), TokenizerSection(), CommonSection()

    apply_pretrained(PretrainedSection(source="some"), model, tokenizer, common)

    assert (model.name, tokenizer.name) == ("some", "some")

    section = PretrainedSection(source="some", step=3)

    with pytest.raises(RecipeError, match=r"`pretrained\.step` must be null for an as"):
        apply_pretrained(section, model, tokenizer, common)


def test_other_directories_are_refused(tmp_path: Path) -> None:
    def apply(source: Path) -> None:
        section = PretrainedSection(source=str(source))
        apply_pretrained(section, ModelSection(), TokenizerSection(), CommonSection())

    with pytest.raises(RecipeError, match="nothing' is no directory"):
        apply(tmp_path / "nothing")

    with pytest.raises(RecipeError, match=r"it has no checkpoints/model\.yaml"):
        apply(tmp_path)

    _make_run(tmp_path)
    tmp_path.joinpath("config.yaml").unlink()

    with pytest.raises(RecipeError, match=r"config\.yaml' must tell the tokenizer"):
        apply(tmp_path)
