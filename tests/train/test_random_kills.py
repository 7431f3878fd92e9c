"""Kills a training again and again: it ends as one that nobody disturbed."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections import deque
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from fairseq2.checkpoint import StandardCheckpointManager
from fairseq2.datasets import SequenceBatch
from fairseq2.file_system import FSspecFileSystem
from fairseq2.metrics import MetricBag

from moxe_plugin.data.reader import RowReader
from moxe_plugin.models.checkpoint_files import TRAINING_STATE, find_damage
from moxe_plugin.train import task
from moxe_plugin.train.continuing import list_resumable_steps
from moxe_plugin.train.finite import FiniteWatch
from moxe_plugin.train.units import CausalLMEvalUnit, CausalLMTrainUnit
from tests.killing import Fault, at_call, at_file_operation, run_killed, within_file
from tests.train.tiny_data import TinyData, pretrain

_SEED: Final = 2505
_NUM_STEPS: Final = 24
_NUM_KILLS: Final = 52

_OVERRIDES: Final = {
    "regime.num_steps": _NUM_STEPS,
    "regime.checkpoint_every_n_steps": 3,
    "regime.validate_every_n_steps": 6,
    "regime.keep_last_n_checkpoints": 2,
    # An epoch ends within the run.
    "dataset.batch_size": 8,
    "dataset.max_num_valid_batches": 2,
}

_NAMED_SHARE: Final = 0.5
"""How often a kill is at a named point, as long as there are such to hit."""

_MAX_NUM_ROUNDS: Final = 25

_VARYING: Final = ("Time", "per Second")

_MANAGER: Final = StandardCheckpointManager


def _cut(part: str, num_chars: int) -> Fault:
    names = ("open", "open_text")

    return within_file(FSspecFileSystem, names, part, num_chars)


def _named_points() -> dict[str, Fault]:
    """List the points that every run of the test must hit."""
    return {
        "while config.yaml is written": _cut("config.yaml", 700),
        "while model.yaml is written": _cut("model.yaml", 100),
        "before the first batch is read": at_call(RowReader, "__next__"),
        "after a batch is read": at_call(RowReader, "__next__", 3, after=True),
        "in the forward pass": at_call(CausalLMTrainUnit, "process_batch", 5),
        "between gradient and update": at_call(FiniteWatch, "check_step", 4),
        "after the update": at_call(CausalLMTrainUnit, "finish_step", 5),
        "while training metrics are written": _cut("metrics/train.jsonl", 900),
        "while the state of the data is taken": at_call(RowReader, "state_dict", 2),
        "while the trainer is saved": _cut("tmp/trainer/", 500),
        "while the model is saved": _cut("tmp/model/", 40_000),
        "while the optimizer is saved": _cut("tmp/optimizer/", 70_000),
        "while the reader is saved": _cut("tmp/data_reader/", 300),
        "before the checkpoint is renamed": at_call(FSspecFileSystem, "move", 2),
        "when it has been renamed": at_call(FSspecFileSystem, "move", after=True),
        "before model.yaml is kept": at_call(task, "keep_model_card"),
        "when it has been kept": at_call(task, "keep_model_card", 2, after=True),
        "in the validation": at_call(CausalLMEvalUnit, "process_batch", 2),
        "while its metrics are written": _cut("metrics/valid.jsonl", 40),
        "while its score is written": _cut("scores/", 3),
        "before the trainer is restored": at_call(_MANAGER, "load_trainer_state"),
        "before the model is restored": at_call(_MANAGER, "load_model_state"),
        "before the optimizer is restored": at_call(_MANAGER, "load_optimizer_state"),
        "when all is restored": at_call(_MANAGER, "load_data_reader_state", after=True),
    }


def _deletion(output_dir: Path) -> Fault:
    """Kill within the deletion of an old checkpoint."""

    def arm() -> None:
        original = FSspecFileSystem.remove_directory

        def remove(self: FSspecFileSystem, path: Path) -> None:
            if not path.name.endswith(".tmp"):
                at_file_operation(output_dir, 2, "sdp_00.pt")()

            original(self, path)

        FSspecFileSystem.remove_directory = remove  # type: ignore[method-assign]

    return arm


@pytest.fixture(scope="module")
def undisturbed_dir(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train without a kill.

    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory.
    """
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"

    # In this process, so that those forked from it have everything loaded.
    with pytest.MonkeyPatch.context() as monkeypatch:
        _record_batches(output_dir, monkeypatch)

        pretrain(tiny_data, output_dir, _OVERRIDES)

    return output_dir


def _record_batches(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the step and a checksum of each batch to a file."""
    original = CausalLMTrainUnit.process_batch
    set_step_nr = CausalLMTrainUnit.set_step_nr

    step = 0

    def note_step_nr(self: CausalLMTrainUnit, step_nr: int) -> None:
        nonlocal step

        step = step_nr

        set_step_nr(self, step_nr)

    def process_batch(
        self: CausalLMTrainUnit, batch: SequenceBatch, metric_bag: MetricBag
    ) -> Any:
        digest = zlib.crc32(batch.seqs.numpy().tobytes())

        with (output_dir.parent / "batches").open("a") as file:
            file.write(f"{step} {digest}\n")

        return original(self, batch, metric_bag)

    monkeypatch.setattr(CausalLMTrainUnit, "set_step_nr", note_step_nr)
    monkeypatch.setattr(CausalLMTrainUnit, "process_batch", process_batch)


def test_training_survives_kills_anywhere(
    tiny_data: TinyData, undisturbed_dir: Path, tmp_path: Path
) -> None:
    rng = random.Random(_SEED)

    # Each must be hit; those that a run does not come to any more wait for the next.
    named = deque(rng.sample(list(_named_points().items()), k=len(_named_points())))

    num_kills, num_rounds = 0, 0

    while num_kills < _NUM_KILLS or named:
        num_rounds += 1
        assert num_rounds < _MAX_NUM_ROUNDS, f"never reached: {named}"

        output_dir = tmp_path / f"round_{num_rounds}" / "run"
        output_dir.parent.mkdir()

        num_kills += _kill_until_done(tiny_data, output_dir, rng, named, num_kills)

        _assert_same(output_dir, undisturbed_dir)

        shutil.rmtree(output_dir.parent)


def _kill_until_done(
    data: TinyData,
    output_dir: Path,
    rng: random.Random,
    named: deque[tuple[str, Fault]],
    num_before: int,
) -> int:
    """Start a training again and again, and return how often it was killed."""

    def train() -> None:
        # The process ends with the training: nothing to undo.
        _record_batches(output_dir, pytest.MonkeyPatch())

        pretrain(data, output_dir, _OVERRIDES)

    log_file = output_dir.parent / "log"

    num_kills = 0

    while True:
        point, after_s = None, None

        if named and rng.random() < _NAMED_SHARE:
            point = named.popleft()
            fault = point[1]
        elif num_before + num_kills >= _NUM_KILLS:
            fault = None
        elif rng.random() < 0.2:
            fault = _deletion(output_dir)
        elif rng.random() < 0.5:
            fault = at_file_operation(output_dir, rng.randrange(1, 150))
        else:
            fault, after_s = None, rng.uniform(0.05, 1.5)

        if not run_killed(train, fault, after_s=after_s, log_file=log_file):
            if point is not None:
                named.append(point)

            return num_kills

        num_kills += 1

        for step in list_resumable_steps(output_dir)[-1:]:
            step_dir = output_dir / "checkpoints" / f"step_{step}"

            assert find_damage(step_dir, TRAINING_STATE) is None


def _assert_same(output_dir: Path, expected_dir: Path) -> None:
    for category in ("train", "valid"):
        lines = _read_metrics(output_dir, category)
        expected = {
            line["Step"]: line for line in _read_metrics(expected_dir, category)
        }

        assert {line["Step"] for line in lines} == expected.keys()

        for line in lines:
            assert line == expected[line["Step"]]

    assert _read_batches(output_dir) == _read_batches(expected_dir)

    step_dirs = [
        d / "checkpoints" / f"step_{_NUM_STEPS}" for d in (output_dir, expected_dir)
    ]

    files = [sorted(f.relative_to(d) for f in d.rglob("*.*")) for d in step_dirs]
    assert files[0] == files[1]

    for file in files[0]:
        if file.suffix != ".pt":
            assert (
                step_dirs[0].joinpath(file).read_bytes()
                == step_dirs[1].joinpath(file).read_bytes()
            )
            continue

        state, expected_state = (
            torch.load(d / file, weights_only=False) for d in step_dirs
        )
        state.pop("_base_wall_time", None)
        expected_state.pop("_base_wall_time", None)

        _assert_equal(state, expected_state, str(file))


def _read_metrics(output_dir: Path, category: str) -> list[dict[str, Any]]:
    text = (output_dir / "metrics" / f"{category}.jsonl").read_text()

    return [
        {k: v for k, v in json.loads(line).items() if not any(p in k for p in _VARYING)}
        for line in text.splitlines()
    ]


def _read_batches(output_dir: Path) -> set[tuple[str, ...]]:
    """Read the checksums of the batches by step; one that differs is one more."""
    lines = (output_dir.parent / "batches").read_text().splitlines()

    return {tuple(line.split()) for line in lines}


def _assert_equal(actual: Any, expected: Any, where: str) -> None:
    assert type(actual) is type(expected), where

    if isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys(), where

        for key in actual:
            _assert_equal(actual[key], expected[key], f"{where}: {key}")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), where

        for index, pair in enumerate(zip(actual, expected, strict=True)):
            _assert_equal(*pair, f"{where}: {index}")
    elif hasattr(actual, "__dict__"):
        _assert_equal(vars(actual), vars(expected), where)
    else:
        assert actual == expected, where
