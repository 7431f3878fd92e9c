"""Checks how recipes and presets are looked up."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from moxe_plugin.resources import resource_dir
from moxe_plugin.train import registry
from moxe_plugin.train.registry import (
    UnknownNameError,
    find_preset,
    get_recipe_entry,
    list_presets,
)


def test_presets_belong_to_their_recipe() -> None:
    assert "quickstart/moxe" in list_presets("lm/pretrain")
    assert "instruct/quickstart" in list_presets("lm/instruction_finetune")
    assert "generate/greedy" in list_presets("lm/generate")


def test_suites_are_not_presets() -> None:
    names = [n for r in ("lm/pretrain", "lm/generate") for n in list_presets(r)]

    assert not [n for n in names if n.startswith("suites/")]


def test_preset_is_found_in_the_resources() -> None:
    expected = resource_dir("recipes") / "quickstart" / "moxe.yaml"

    assert find_preset("lm/pretrain", "quickstart/moxe") == expected


@pytest.mark.parametrize(
    ("preset", "hint"),
    [
        ("quikstart/moxe", "Did you mean quickstart/moxe"),
        ("xlstm", "Did you mean .*quickstart/xlstm"),
        ("instruct/quickstart", "must be a preset of `lm pretrain`"),
    ],
)
def test_unknown_preset_is_refused_with_a_hint(preset: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        find_preset("lm/pretrain", preset)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="one of the recipes lm/pretrain, "):
        get_recipe_entry("lm/pretrian")


def test_recipe_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "moxe_plugin.train.pretrain:LMPretrainRecipe"

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [EntryPoint("mt/train", target, group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)

    entry = get_recipe_entry("mt/train")

    assert type(entry.load()).__name__ == "LMPretrainRecipe"
    assert list_presets("mt/train") == []
