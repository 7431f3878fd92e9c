"""Checks the commands `fairseq2` and `moxe` without training anything."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moxe_plugin.cli import main, moxe_main
from moxe_plugin.train.registry import list_presets, list_recipes


def _dump_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main([*args, "--dump-config"]) == 0

    config = YAML(typ="safe", pure=True).load(StringIO(capsys.readouterr().out))

    assert isinstance(config, dict)

    return config


def _fail(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exc_info:
        main(args)

    assert exc_info.value.code == 2

    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("main", "-h"),
        ("main", "lm -h"),
        ("main", "lm pretrain -h"),
        ("main", "lm pretrain --list-presets"),
        ("main", "assets -h"),
        ("moxe_main", "-h"),
        ("moxe_main", "data -h"),
        ("moxe_main", "data build -h"),
    ],
)
def test_help_imports_nothing_heavy(command: str, args: str) -> None:
    code = (
        "import sys\n"
        f"from moxe_plugin.cli import {command}\n"
        "try:\n"
        f"    {command}(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'fairseq2', 'yaml')))\n"
    )

    subprocess.run([sys.executable, "-c", code, *args.split()], check=True)


def test_list_presets_marks_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm", "pretrain", "--list-presets"]) == 0

    lines = capsys.readouterr().out.splitlines()

    assert "quickstart/moxe (default)" in lines
    assert "smoke" in lines

    assert main(["lm", "pretrain", "--list-preset-configs"]) == 0

    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [(r.name, p) for r in list_recipes() for p in list_presets(r.name)],
)
def test_every_preset_is_a_valid_configuration(
    capsys: pytest.CaptureFixture[str], recipe: str, preset: str
) -> None:
    group, command = recipe.split("/")

    options = [] if recipe == "lm/pretrain" else ["--config", "model.name=foo"]

    if recipe == "lm/generate":
        options += ["tokenizer.name=foo", "prompts=[a]"]

    config = _dump_config(capsys, group, command, "--preset", preset, *options)

    assert config["common"]["no_sweep_dir"] is True


def test_default_preset_is_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    config = _dump_config(capsys, "lm", "pretrain")

    assert config == _dump_config(
        capsys, "lm", "pretrain", "--preset", "quickstart/moxe"
    )


def test_files_and_values_are_merged_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]

    files[0].write_text("regime: {num_steps: 11, validate_every_n_steps: 30}")
    files[1].write_text("regime: {num_steps: 12}")

    config = _dump_config(
        capsys,
        *("lm", "pretrain", "--preset", "smoke"),
        *("--config-file", *map(str, files)),
        *("--config", "dataset.seq_len=99", "add:model.config_overrides.pad_idx=3"),
        *("--config", "dataset.batch_size=7", "del:dataset.name"),
        *("--sweep-format", "{preset}.{hash}", "--debug"),
    )

    assert config["regime"]["num_steps"] == 12
    assert config["regime"]["validate_every_n_steps"] == 30
    assert config["dataset"]["seq_len"] == 99
    assert config["dataset"]["batch_size"] == 7
    assert config["model"]["config_overrides"]["vocab_size"] == 2048
    assert config["model"]["config_overrides"]["pad_idx"] == 3
    assert config["common"]["sweep_format"] == "smoke.{hash}"
    assert config["common"]["no_sweep_dir"] is False
    assert config["common"]["debug"] is True


def test_shortcuts_set_configuration_keys(capsys: pytest.CaptureFixture[str]) -> None:
    config = _dump_config(
        capsys,
        *("lm", "generate", "--from", "moxe_foo"),
        *("--prompt", "a: b", "--prompt", "c"),
        *("--no-sweep-dir", "--cluster", "none", "--no-debug"),
    )

    assert config["pretrained"] == {"source": "moxe_foo", "step": None}
    assert config["model"]["name"] == config["tokenizer"]["name"] == "moxe_foo"
    assert config["prompts"] == ["a: b", "c"]
    assert config["common"]["cluster"] == "none"


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], None), (["--stream"], True), (["--no-stream"], False)],
    ids=["neither", "yes", "no"],
)
def test_switches_set_configuration_keys(
    options: list[str], expected: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("lm", "generate", "--from", "moxe_foo", "--prompt", "One", *options)

    assert _dump_config(capsys, *args)["stream"] is expected


def test_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    err = _fail(capsys, "lm", "pretrain", "out", "--preset", "quickstart/mox")

    assert "Did you mean quickstart/moxe" in err


def test_missing_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    err = _fail(capsys, "lm", "pretrain", "out", "--config-file", "nothing.yaml")

    assert "'nothing.yaml' does not exist." in err


def test_missing_output_dir_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "put it before all options" in _fail(capsys, "lm", "pretrain")


def test_output_dir_may_follow_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # One process cannot be two; this fails after the output directory was made.
    options = ("--config", "gang.tensor_parallel_size=2")

    _fail(capsys, "lm", "pretrain", *options, str(tmp_path / "out"))

    assert tmp_path.joinpath("out", "config.yaml").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regime.num_data_epochs=1"], "`num_data_epochs` must be null"),
        (["model.family=foo"], "`model.family` must be a known name, but is 'foo'"),
        (["model.arch=foo"], "foo"),
        (["foo=1"], "foo"),
    ],
)
def test_wrong_values_are_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    err = _fail(capsys, "lm", "pretrain", str(tmp_path), "--config", *overrides)

    assert message in err


def test_unknown_training_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    err = _fail(
        capsys,
        *("lm", "instruction_finetune", str(tmp_path / "out")),
        *("--from", str(tmp_path / "nothing")),
    )

    assert "must be the output directory of a training run" in err


def test_assets_lists_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assets", "list", "--type", "tokenizer"]) == 0

    assert "moxe_embedded_tokenizer" in capsys.readouterr().out


def test_moxe_hands_over_to_its_modules(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exc_info:
        moxe_main(["data", "-h"])

    assert exc_info.value.code == 0
    assert "usage: moxe data" in capsys.readouterr().out


def test_moxe_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moxe_main(["-h"])

    out = capsys.readouterr().out

    assert all(name in out for name in ("data", "bench", "tables", "doctor"))


def test_file_as_output_dir_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.touch()

    assert "`OUTPUT_DIR` must be a directory" in _fail(
        capsys, "lm", "pretrain", str(file)
    )
