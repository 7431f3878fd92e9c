"""Tries checkpoints that would run code: none does, and a message says which would."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq2.assets import AssetCardError
from fairseq2.model_checkpoint import CorruptModelCheckpointError
from fairseq2.recipe.error import RecipeError
from safetensors.torch import save_file

from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.hf.folder import open_exported
from moxe_plugin.models.moxe import MoxEConfig, get_moxe_model_hub
from moxe_plugin.models.pickle_scan import (
    UnsafeCheckpointError,
    check_safe_to_unpickle,
)
from moxe_plugin.train.launch import load_preset, run_recipe
from moxe_plugin.train.safe_resume import list_unrestricted_files
from tests.security.conftest import Payload
from tests.train.tiny_data import TinyData, pretrain

STATES = [
    "trainer/rank_00.pt",
    "data_reader/dp_00.pt",
    "optimizer/pp_00/tp_00/sdp_00.pt",
]

MODEL_FILE = "checkpoints/step_8/model/pp_00/tp_00/sdp_00.pt"


def _ran(payload: Payload) -> bool:
    return payload.marker.exists()


def test_payload_would_run(payload: Payload, tmp_path: Path) -> None:
    torch.save({"a": payload}, tmp_path / "a.pt")

    torch.load(tmp_path / "a.pt", weights_only=False)

    assert _ran(payload)


def _as_torch_file(payload: Payload, file: Path) -> None:
    state = torch.load(file, weights_only=False)

    torch.save({**state, "more": payload}, file)


def _as_plain_pickle(payload: Payload, file: Path) -> None:
    file.write_bytes(pickle.dumps({"more": payload}))


def _as_legacy_file(payload: Payload, file: Path) -> None:
    torch.save({"more": payload}, file, _use_new_zipfile_serialization=False)


def _as_attribute_of_an_allowed_module(payload: Payload, file: Path) -> None:
    # Protocol 4 imports `torch.distributed.tensor.DTensor` by a path, which may go on.
    command = f"touch {payload.marker}".encode()

    content = (
        b"\x80\x04"
        + _text(b"torch.distributed.tensor.placement_types")
        + _text(b"torch.os.system")
        + b"\x93"
        + _text(command)
        + b"\x85R."
    )

    _write_archive(file, content)


def _as_nested_persistent_id(payload: Payload, file: Path) -> None:
    buffer = io.BytesIO()

    pickler = pickle.Pickler(buffer, 2)
    pickler.persistent_id = lambda obj: ("storage", payload) if obj is buffer else None  # type: ignore[method-assign]
    pickler.dump({"more": buffer})

    _write_archive(file, buffer.getvalue())


def _as_program(_payload: Payload, file: Path) -> None:
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Program()).save(str(file))


def _text(content: bytes) -> bytes:
    return b"\x8c" + struct.pack("B", len(content)) + content


def _write_archive(file: Path, content: bytes) -> None:
    writer = torch._C.PyTorchFileWriter(str(file))
    writer.write_record("data.pkl", content, len(content))
    writer.write_end_of_file()


ATTACKS = [
    _as_torch_file,
    _as_plain_pickle,
    _as_legacy_file,
    _as_attribute_of_an_allowed_module,
    _as_nested_persistent_id,
    _as_program,
]

all_attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__[1:])


def _continue(data: TinyData, run: Path) -> None:
    pretrain(data, run, {"regime.num_steps": 12})


@pytest.mark.parametrize("state", STATES)
def test_training_does_not_open_an_unsafe_state(
    safe_data: TinyData, run_copy: Path, payload: Payload, state: str
) -> None:
    file = run_copy / "checkpoints" / "step_8" / state
    _as_torch_file(payload, file)

    with pytest.raises(UnsafeCheckpointError, match=r"would run `posix\.system`"):
        _continue(safe_data, run_copy)

    assert not _ran(payload)


@all_attacks
def test_unsafe_file_is_found(
    run_copy: Path, payload: Payload, attack: Callable[[Payload, Path], None]
) -> None:
    file = run_copy / "checkpoints" / "step_8" / STATES[0]
    attack(payload, file)

    with pytest.raises(UnsafeCheckpointError, match=r"rank_00\.pt' must"):
        check_safe_to_unpickle(file)

    assert not _ran(payload)


def test_own_checkpoint_is_safe(run_copy: Path) -> None:
    files = list(list_unrestricted_files(run_copy / "checkpoints" / "step_8"))

    assert len(files) == 3

    for file in files:
        check_safe_to_unpickle(file)


def test_states_of_other_types_are_safe(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "names": ["a", ("b",), {"c"}],
        "tensors": [torch.zeros(2, dtype=t) for t in (torch.bfloat16, torch.bool)],
        "parameter": torch.nn.Parameter(torch.ones(1)),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "order": torch.random.get_rng_state(),
    }

    for protocol in (2, 5):
        torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)

        check_safe_to_unpickle(tmp_path / "a.pt")


@all_attacks
def test_parameters_are_not_unpickled(
    run_copy: Path, payload: Payload, attack: Callable[[Payload, Path], None]
) -> None:
    attack(payload, run_copy / MODEL_FILE)

    # fairseq2 wraps what `torch.load(weights_only=True)` refuses, or the key that is
    # too many.
    with pytest.raises((AssetCardError, CorruptModelCheckpointError, ValueError)):
        load_checkpoint(run_copy)

    assert not _ran(payload)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("restrict: false", "restrict"),
        ("restrict: 0", "restrict"),
        ("more: {a: [{trust_remote_code: true}]}", "trust_remote_code"),
    ],
)
def test_card_cannot_lift_the_restriction(
    safe_data: TinyData, run_copy: Path, payload: Payload, line: str, key: str
) -> None:
    _as_torch_file(payload, run_copy / MODEL_FILE)

    with (run_copy / "checkpoints" / "model.yaml").open("a") as fp:
        fp.write(line + "\n")

    with pytest.raises(ValueError, match=f"`{key}` in '.*model.yaml' must be left out"):
        load_checkpoint(run_copy)

    overrides = {
        **safe_data.pretrain_overrides,
        "model.family": None,
        "model.arch": None,
        "model.config_overrides": None,
        "model.name": "last_checkpoint",
        "common.assets.prev_checkpoint_dir": str(run_copy / "checkpoints"),
    }

    with pytest.raises(RecipeError, match=f"`{key}` in '.*model.yaml' must be left"):
        run_recipe(
            "lm/pretrain",
            load_preset("smoke", overrides),
            run_copy.parent / "out",
            quiet=True,
        )

    assert not _ran(payload)


@pytest.mark.parametrize("name", ["checkpoints/model.yaml", "config.yaml"])
def test_yaml_of_a_run_makes_no_objects(
    run_copy: Path, payload: Payload, name: str
) -> None:
    with (run_copy / name).open("a") as fp:
        fp.write(f"more: !!python/object/apply:os.system ['touch {payload.marker}']\n")

    with pytest.raises(ValueError, match="is not valid YAML"):
        load_checkpoint(run_copy)

    assert not _ran(payload)


@pytest.mark.usefixtures("fairseq2_setup")
def test_checkpoints_of_the_authors_are_not_unpickled(
    tmp_path: Path, payload: Payload
) -> None:
    config = MoxEConfig(vocab_size=64)

    arrays: dict[str, Any] = {"a": np.array([payload], dtype=object)}
    np.savez(tmp_path / "a.npz", **arrays)
    torch.save({"a": payload}, tmp_path / "a.pt")

    for name in ("a.npz", "a.pt"):
        with pytest.raises(CorruptModelCheckpointError):
            get_moxe_model_hub().load_custom_model(tmp_path / name, config)

    assert not _ran(payload)


def _with_header(header: dict[str, Any], num_bytes: int) -> bytes:
    text = json.dumps(header).encode()

    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def _f32(begin: int, end: int, size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        _with_header({"a": _f32(0, 8, 2), "b": _f32(4, 12, 2)}, 12),
        _with_header({"a": _f32(0, 4096, 1024)}, 8),
        _with_header({"a": _f32(0, 8, 1024)}, 8),
        _with_header({"a": _f32(8, 0, 2)}, 8),
        _with_header({"a": {**_f32(0, 8, 2), "shape": [2**62, 2**3]}}, 8),
        _with_header({"a": {**_f32(0, 8, 2), "dtype": "PICKLE"}}, 8),
        struct.pack("<Q", 9) + b"[" * 9,
    ],
    ids=[
        *("empty", "huge_header", "header_beyond_file", "overlap", "beyond_file"),
        *("too_short", "backwards", "overflow", "unknown_type", "nested"),
    ],
)
def test_header_of_safetensors_is_checked(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moxe"}))
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(ValueError, match=r"is not a safetensors file|exactly the"):
        open_exported(tmp_path)


def test_exported_folder_names_no_classes(tmp_path: Path, payload: Payload) -> None:
    code = f"import os\nos.system('touch {payload.marker}')\n"
    (tmp_path / "evil.py").write_text(code)

    config = {
        "model_type": "evil",
        "auto_map": {
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.EvilModel",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"`model_type` in .* must be one of"):
        load_checkpoint(tmp_path)

    config["model_type"] = "moxe"
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="exactly the parameters"):
        load_checkpoint(tmp_path)

    assert not _ran(payload)
