"""Fixtures of the tests of export: a run of each family, and what is exported of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ruamel.yaml import YAML

from moxe_plugin.eval.checkpoints import LoadedModel, load_checkpoint
from moxe_plugin.export.exporting import export_checkpoint
from tests.eval.test_checkpoints import write_checkpoint


class Exported(NamedTuple):
    """A run and the folder that was exported of it."""

    run_dir: Path
    folder: Path
    loaded: LoadedModel
    """The model of the run."""


Export = Callable[[str], Exported]


@pytest.fixture(scope="session")
def export(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    """Return a function that exports a tiny random model of a family, once."""
    done: dict[str, Exported] = {}

    def export(family: str) -> Exported:
        if family not in done:
            done[family] = _export(family, tmp_path_factory.mktemp(family))

        return done[family]

    return export


def _export(family: str, directory: Path) -> Exported:
    run_dir, folder = directory / "run", directory / "exported"

    write_checkpoint(run_dir, family, steps=(3,))
    _sharpen(run_dir / "checkpoints/step_3/model/pp_00/tp_00/sdp_00.pt")

    _complete(run_dir)

    export_checkpoint(run_dir, folder)

    return Exported(run_dir, folder, load_checkpoint(run_dir))


def _sharpen(file: Path) -> None:
    # Sharper predictions than a fresh model's, so that an error shows.
    state = torch.load(file, weights_only=True)

    shared = {t.data_ptr(): t for t in state.values() if t.ndim > 1}
    for tensor in shared.values():
        tensor.mul_(2.0)

    torch.save(state, file)


def _complete(run_dir: Path) -> None:
    yaml = YAML(typ="safe", pure=True)

    # As fairseq2 writes it.
    config = yaml.load(run_dir / "config.yaml")
    config["tokenizer"].update(name=None, config_overrides=None)
    yaml.dump(config, run_dir / "config.yaml")

    # As recipes want it: the pad token of the tokenizer.
    card = yaml.load(run_dir / "checkpoints/model.yaml")
    card["model_config"]["pad_idx"] = 1
    yaml.dump(card, run_dir / "checkpoints/model.yaml")
