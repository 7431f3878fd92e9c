"""Checks how a configuration is composed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe_plugin.train.launch import ConfigFileError, compose_config, load_preset
from moxe_plugin.train.pretrain import LMPretrainConfig


def test_preset_sets_what_differs_from_the_default_values() -> None:
    config = load_preset("quickstart/xlstm")

    assert isinstance(config, LMPretrainConfig)
    assert (config.model.family, config.model.arch) == ("xlstm", "quickstart")
    assert config.common.no_sweep_dir


def test_overrides_replace_values() -> None:
    overrides: dict[str, object] = {
        "model.config_overrides": {"vocab_size": 320},
        "regime.num_steps": 7,
    }

    config = load_preset("smoke", overrides)

    assert config.model.config_overrides == {"vocab_size": 320}
    assert config.regime.num_steps == 7


def test_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigFileError, match=r"does not fit `LMPretrainConfig`.*sp"):
        load_preset("smoke", {"regime.num_stesp": 7})


def test_files_are_merged_from_left_to_right(tmp_path: Path) -> None:
    for name, text in {
        "a": "regime: {num_steps: 1, validate_every_n_steps: 1}",
        "b": "{regime: {num_steps: 1e1}, dataset: {path: '${dir}/tokens'}}",
        "c": "# only a comment",
    }.items():
        tmp_path.joinpath(f"{name}.yaml").write_text(text)

    files = [tmp_path / f"{name}.yaml" for name in "abc"]

    config = load_preset(None, files=files)

    assert config.regime.num_steps == 10
    assert config.regime.validate_every_n_steps == 1
    assert config.dataset.path == tmp_path / "tokens"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("[1]", "must hold a mapping"),
        ("_del_: 1", "cannot be merged"),
    ],
    ids=["syntax", "list", "del"],
)
def test_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)

    with pytest.raises(ConfigFileError, match=message):
        compose_config(LMPretrainConfig, [file])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="does not exist"):
        compose_config(LMPretrainConfig, [tmp_path / "a.yaml"])
