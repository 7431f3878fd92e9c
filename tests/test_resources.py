"""Tests of moxe_plugin/resources/."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe_plugin.resources import directory, resource_dir


@pytest.mark.parametrize("name", ["recipes", "eval_tasks"])
def test_every_resource_holds_yaml(name: directory.ResourceName) -> None:
    assert sorted(resource_dir(name).rglob("*.yaml"))


def test_a_wheel_is_preferred_to_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, checkout = tmp_path / "packaged", tmp_path / "checkout"
    (packaged / "recipes").mkdir(parents=True)
    (checkout / "recipes").mkdir(parents=True)
    (checkout / "eval_tasks").mkdir()
    monkeypatch.setattr(directory, "_PACKAGED", packaged)
    monkeypatch.setattr(directory, "_CHECKOUT", checkout)

    assert resource_dir("recipes") == packaged / "recipes"
    assert resource_dir("eval_tasks") == checkout / "eval_tasks"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of recipes, eval_tasks, but is 'cards'"):
        resource_dir("cards")  # type: ignore[arg-type]  # what is tested


def test_a_broken_installation_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(directory, "_CHECKOUT", tmp_path / "checkout")

    with pytest.raises(FileNotFoundError, match="Reinstall moxe-plugin"):
        resource_dir("recipes")
