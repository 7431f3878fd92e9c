"""Writes what someone has who holds a checkpoint of the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor

from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.interop import to_authors
from moxe_plugin.models.moxe.interop import authors_moxe_parameters
from tests.models.families import create_model, get_arch

CARD_NAME: Final = "from_the_authors"


def write_card_of_the_authors(
    path: Path, change: Callable[[dict[str, Tensor]], None] | None = None
) -> AuxLossCausalLM:
    """Write an asset card, a checkpoint of random parameters and a tokenizer.

    :param path: A new directory, to be named by ``FAIRSEQ2_USER_ASSET_DIR``.
    :param change: Changes the parameters, under their names, before they are written.

    :returns: The model whose parameters they are, in float32.
    """
    path.mkdir()

    model = create_model("moxe", "authors_tiny", dtype=torch.float32).eval()

    theirs = to_authors(
        model.state_dict(), authors_moxe_parameters(get_arch("moxe", "authors_tiny"))
    )
    if change is not None:
        change(theirs)

    np.savez(path / "theirs.npz", **{n: t.numpy() for n, t in theirs.items()})  # type: ignore[arg-type]  # names of arrays

    train_bpe(["some text to learn from"] * 4, 260, path / "tokenizer")

    card = {
        "name": CARD_NAME,
        "model_family": "moxe",
        "model_arch": "authors_tiny",
        "model_config_overrides": {"pad_idx": 1},
        "checkpoint": path.joinpath("theirs.npz").as_uri(),
        "tokenizer_family": "moxe_hg",
        "tokenizer": path.joinpath("tokenizer").as_uri(),
    }
    YAML(typ="safe", pure=True).dump(card, path / "card.yaml")

    return model
