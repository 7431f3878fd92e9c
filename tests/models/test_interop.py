"""Loads checkpoints of the authors' code as a user does: by asset card, or by path."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq2.assets import AssetCard, AssetCardError
from fairseq2.models import load_model
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from moxe_plugin.models.interop import to_authors
from moxe_plugin.models.moxe import MoxEConfig, get_moxe_model_hub
from moxe_plugin.models.moxe.architectures import ABLATIONS
from moxe_plugin.models.moxe.interop import authors_moxe_parameters
from moxe_plugin.models.xlstm.interop import authors_xlstm_parameters
from tests.common import assert_close
from tests.models.families import create_model, get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

FIXTURE = Path(__file__).parents[1] / "fixtures/parity/A.npz"
"""What the authors' code computed with a MoxE of two layers."""

FIXTURE_CONFIG: dict[str, object] = {
    "vocab_size": 64,
    "max_seq_len": 12,
    "model_dim": 16,
    "num_heads": 4,
    "qkv_block_size": 16,
    "difficulty_bias_scale": 0.7,
}
"""How it differs from ``authors_tiny``."""

ROUTER = "moe/layers/0/gate/router/kernel"

LIST_PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "moxe": authors_moxe_parameters,
    "xlstm": authors_xlstm_parameters,
}


def _save(file: Path, state: dict[str, Tensor]) -> None:
    if file.suffix == ".npz":
        np.savez(file, **{name: t.numpy() for name, t in state.items()})  # type: ignore[arg-type]  # names of arrays
    elif file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)


def _card(
    file: Path,
    family: str = "moxe",
    arch: str = "authors_tiny",
    overrides: dict[str, object] | None = None,
) -> AssetCard:
    fields = {
        "model_family": family,
        "model_arch": arch,
        "model_config_overrides": overrides or {},
        "checkpoint": file.as_uri(),
    }

    return AssetCard("from_the_authors", fields)


def _fixture() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the parameters, token ids and logits of the fixture."""
    with np.load(FIXTURE) as file:
        arrays = {name: torch.from_numpy(array) for name, array in file.items()}

    others = ("in/", "out/", "inter/", "loss/", "grad/")
    parameters = {n: t for n, t in arrays.items() if not n.startswith(others)}

    return parameters, arrays["in/input_ids"].long(), arrays["out/logits"]


def _compute(model: Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(ids, BatchLayout.of(ids))
    assert isinstance(logits, Tensor)

    return logits


def test_the_fixture_has_the_configuration_that_these_tests_say() -> None:
    config = json.loads(FIXTURE.with_suffix(".json").read_text())["config"]

    assert config["gamma"] == FIXTURE_CONFIG["difficulty_bias_scale"]
    assert config["xlstm"]["embedding_dim"] == FIXTURE_CONFIG["model_dim"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_checkpoint_of_the_authors_computes_their_logits(
    tmp_path: Path, suffix: str
) -> None:
    parameters, ids, logits = _fixture()
    file = tmp_path / f"theirs{suffix}"
    _save(file, parameters)

    by_card = load_model(_card(file, overrides=FIXTURE_CONFIG))
    assert_close(_compute(by_card, ids), logits, atol=1e-4, rtol=0.0)

    config = get_arch("moxe", "authors_tiny")
    for name, value in FIXTURE_CONFIG.items():
        setattr(config, name, value)

    by_path = get_moxe_model_hub().load_custom_model(file, config)
    assert_close(_compute(by_path, ids), logits, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("moxe", "authors_tiny"),
        *(("moxe", f"authors_tiny_{ablation}") for ablation in ABLATIONS),
        ("moxe", "tiny"),
        ("xlstm", "tiny"),
    ],
)
def test_every_system_loads_what_is_written_in_the_names_of_the_authors(
    tmp_path: Path, family: str, arch: str
) -> None:
    ours = create_model(family, arch, dtype=torch.float32).state_dict()
    file = tmp_path / "theirs.npz"
    _save(file, to_authors(ours, LIST_PARAMETERS[family](get_arch(family, arch))))

    loaded = load_model(_card(file, family, arch)).state_dict()

    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


def test_names_of_ours_are_left_alone(tmp_path: Path) -> None:
    ours = create_model("moxe", dtype=torch.float32).state_dict()
    file = tmp_path / "ours.npz"
    _save(file, ours)

    loaded = load_model(_card(file, arch="tiny")).state_dict()

    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


def _rename(state: dict[str, Tensor]) -> None:
    state["moe/layers/0/gate/kernel"] = state.pop(ROUTER)


def _transpose(state: dict[str, Tensor]) -> None:
    state[ROUTER] = state[ROUTER].mT.contiguous()


def _add_dimension(state: dict[str, Tensor]) -> None:
    state["lm_head/kernel"] = state["lm_head/kernel"].unsqueeze(0)


def _add(state: dict[str, Tensor]) -> None:
    state["moe/extra"] = torch.ones(1)


def _remove(state: dict[str, Tensor]) -> None:
    del state[ROUTER]


def _mix(state: dict[str, Tensor]) -> None:
    state["router.weight"] = state.pop(ROUTER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _rename,
            f"'{ROUTER}' is missing (1 in all) and 'moe/layers/0/gate/kernel' is none "
            "of them (1 in all). Describe the model",
        ),
        (
            _transpose,
            f"'{ROUTER}' of the checkpoint must have the shape (16, 4) that the "
            "configuration asks for, but has (4, 16) instead. Describe the model",
        ),
        (_add_dimension, "'lm_head/kernel' of the checkpoint must have the shape (16,"),
        (_add, "but 'moe/extra' is none of them (1 in all)"),
        (_remove, f"but '{ROUTER}' is missing (1 in all)"),
        (
            _mix,
            "not both, but has 173 like 'lm_head/kernel' and 1 like 'router.weight'",
        ),
    ],
    ids=["renamed", "transposed", "dimension", "added", "removed", "mixed"],
)
def test_an_array_that_does_not_fit_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    parameters, _, _ = _fixture()
    damage(parameters)
    file = tmp_path / "theirs.npz"
    _save(file, parameters)

    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(_card(file, overrides=FIXTURE_CONFIG))


def test_a_model_of_another_size_says_how_to_describe_it(tmp_path: Path) -> None:
    parameters, _, _ = _fixture()
    file = tmp_path / "theirs.npz"
    _save(file, parameters)

    message = r"must have the shape \(\d+, 32\).* by `model_arch` and `model_config_ov"

    with pytest.raises(ValueError, match=message):
        load_model(_card(file, overrides={"num_heads": 4}))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"no zip file"), "plain arrays, but is not"),
        (lambda file: file.write_bytes(b""), "plain arrays, but is not"),
        (
            lambda file: file.write_bytes(FIXTURE.read_bytes()[:9000]),
            "plain arrays, but is not",
        ),
        (
            lambda file: np.savez(file, a=np.array([{}], dtype=object)),
            "Object arrays cannot be loaded",
        ),
        (
            lambda file: np.save(file.open("wb"), np.ones(2)),
            "holds a single array without a name",
        ),
        # As NumPy saves JAX's bfloat16.
        (
            lambda file: np.savez(file, a=np.ones(2, dtype="V2")),
            r"'a' in .* but has \|V2 instead. Save it as float32.",
        ),
    ],
    ids=["text", "empty", "cut-short", "pickled", "one-array", "bfloat16"],
)
def test_a_damaged_npz_file_is_explained(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    file = tmp_path / "theirs.npz"
    write(file)

    with pytest.raises(AssetCardError) as error:
        load_model(_card(file))

    assert re.search(message, str(error.value.__cause__))


def test_the_authors_architecture_is_theirs_by_configuration_only() -> None:
    config = get_arch("moxe", "authors_340m")

    assert config == MoxEConfig(
        expert_state="token", load_balance_loss="squared", final_norm=False
    )
