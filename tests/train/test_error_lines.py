"""Checks that a mistake of the user is one line in the log, not a stack trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from fairseq2.datasets import DatasetError
from fairseq2.recipe.error import RecipeConfigParseError

from moxe_plugin.train.launch import compose_config, launch
from moxe_plugin.train.pretrain import LMPretrainRecipe
from moxe_plugin.train.registry import find_preset
from tests.train.tiny_data import TinyData


def _log_of_failure(
    overrides: Mapping[str, object],
    output_dir: Path,
    error: type[Exception],
    capfd: pytest.CaptureFixture[str],
) -> str:
    recipe = LMPretrainRecipe()

    config = compose_config(recipe.config_kls, [find_preset("lm/pretrain", "smoke")])

    args = [f"{key}={'null' if v is None else v}" for key, v in overrides.items()]

    with pytest.raises(error):
        launch(
            recipe,
            config,
            [str(output_dir), "--no-exit-on-error", "--config", *args],
            quiet=True,
        )

    log = capfd.readouterr().err

    assert "Traceback" not in log

    return log


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("regime.num_stepz", 3, "`regime`: .* extra key(s) num_stepz."),
        ("dataset.batch_size", "foo", "`dataset.batch_size`: .* 'foo'"),
        ("model.config_overrides.num_expert", 3, "`model.config_overrides` .*"),
        ("optimizer.config.lr", "foo", "`optimizer.config.lr`: .* 'foo'"),
    ],
)
def test_misspelt_configuration_names_the_key(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    key: str,
    value: object,
    message: str,
) -> None:
    log = _log_of_failure({key: value}, tmp_path, RecipeConfigParseError, capfd)

    first, last = message.split(".*")

    assert first in log
    assert last in log


def test_unreadable_data_is_said(
    tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("manifest.json").write_text("{")

    overrides = {**tiny_data.pretrain_overrides, "dataset.path": tmp_path}
    overrides["model.config_overrides"] = "{_set_: {pad_idx: 1}}"

    log = _log_of_failure(overrides, tmp_path / "out", DatasetError, capfd)

    assert "manifest.json is damaged and cannot be read" in log
