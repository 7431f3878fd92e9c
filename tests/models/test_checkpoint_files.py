"""Damage to a checkpoint file is found wherever it is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from moxe_plugin.models.checkpoint_files import (
    TRAINING_STATE,
    find_damage,
    find_whole_step,
)

_FILES: Final = (
    "trainer/rank_00.pt",
    "model/pp_00/tp_00/sdp_00.pt",
    "optimizer/pp_00/tp_00/sdp_00.pt",
    "data_reader/dp_00.pt",
)

_STATE: Final[dict[str, Any]] = {
    "weight": torch.arange(35.0).view(5, 7),
    "bias": torch.ones(3),
}


def _make_checkpoint(step_dir: Path) -> Path:
    for name in _FILES:
        (step_dir / name).parent.mkdir(parents=True)
        torch.save(_STATE, step_dir / name)

    return step_dir


def test_whole_checkpoint_has_no_damage(tmp_path: Path) -> None:
    step_dir = _make_checkpoint(tmp_path / "step_4")

    assert find_damage(step_dir, TRAINING_STATE) is None
    assert find_damage(step_dir, TRAINING_STATE, part=1, num_parts=2) is None


def test_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    step_dir = _make_checkpoint(tmp_path / "step_4")
    file = step_dir / "model/pp_00/tp_00/sdp_00.pt"

    content = file.read_bytes()
    num_found = num_silent = 0

    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)

        is_found = find_damage(step_dir, ["model"]) is not None

        try:
            state = torch.load(io.BytesIO(flipped), weights_only=True)
        except Exception:  # noqa: BLE001  # torch finds this one, in one of many ways
            continue

        is_same = state.keys() == _STATE.keys() and all(
            torch.equal(state[k], _STATE[k]) for k in _STATE
        )

        # Padding between the tensors, and fields that nobody reads
        assert is_same or is_found

        num_found += is_found
        num_silent += not is_same

    # That torch loads other weights without a word is what the check is for.
    assert num_silent > 35 + 3
    assert num_found >= num_silent


def test_cut_file_is_found(tmp_path: Path) -> None:
    step_dir = _make_checkpoint(tmp_path / "step_4")
    file = step_dir / "optimizer/pp_00/tp_00/sdp_00.pt"

    content = file.read_bytes()

    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])

        damage = find_damage(step_dir, TRAINING_STATE)

        assert damage is not None
        assert damage.path == file
        assert f"cut off or damaged ({length} bytes" in damage.reason


@pytest.mark.parametrize("name", _FILES)
def test_lost_file_is_found(tmp_path: Path, name: str) -> None:
    step_dir = _make_checkpoint(tmp_path / "step_4")

    (step_dir / name).unlink()

    damage = find_damage(step_dir, TRAINING_STATE)

    assert damage is not None
    assert damage.path == step_dir / name.split("/")[0]
    assert damage.reason == "is missing or empty"


def test_lost_shard_is_found(tmp_path: Path) -> None:
    step_dir = _make_checkpoint(tmp_path / "step_4")

    torch.save(_STATE, step_dir / "optimizer/pp_00/tp_00/sdp_01.pt")

    damage = find_damage(step_dir, TRAINING_STATE)

    assert damage is not None
    assert damage.path == step_dir / "model/pp_00/tp_00/sdp_01.pt"


def test_whole_step_is_the_last_one_that_is_whole(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        _make_checkpoint(tmp_path / f"step_{step}")

    (tmp_path / "step_12/data_reader/dp_00.pt").write_bytes(b"PK")

    assert find_whole_step(tmp_path, [4, 8, 12], TRAINING_STATE) == 8
    assert find_whole_step(tmp_path, [4, 8, 12], ["model"]) == 12
    assert find_whole_step(tmp_path, [12], TRAINING_STATE) is None
