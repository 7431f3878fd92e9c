"""What a user reads when a file, disk, loss or process fails, and that it helps."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from fairseq2.checkpoint.manager import CheckpointStateNotValidError
from fairseq2.error import OperationalError
from fairseq2.file_system import FSspecFileSystem
from fairseq2.recipe.error import RecipeError
from torch._C._distributed_c10d import TCPStore

from moxe_plugin.cli import main
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.models.checkpoint_files import DamagedCheckpointError
from moxe_plugin.models.clm import LossTerms
from moxe_plugin.train import units
from moxe_plugin.train.finite import NonFiniteLossError
from tests.train.tiny_data import TinyData, pretrain, read_metrics

_KEEP_TWO: Final = {"regime.keep_last_n_checkpoints": 2}
_TWELVE: Final = {**_KEEP_TWO, "regime.num_steps": 12}

_STATES: Final = {
    "model": "model/pp_00/tp_00/sdp_00.pt",
    "optimizer": "optimizer/pp_00/tp_00/sdp_00.pt",
    "trainer": "trainer/rank_00.pt",
    "data_reader": "data_reader/dp_00.pt",
}


@pytest.fixture
def run_dir(pretrained_dir: Path, tmp_path: Path) -> Path:
    """Copy the output of a training of 8 steps, with checkpoints at 4 and 8.

    :param pretrained_dir: The output.
    :param tmp_path: Where the copy goes.

    :returns: The copy.
    """
    return Path(shutil.copytree(pretrained_dir, tmp_path / "run"))


def _flip_bit(file: Path, position: int = 200) -> None:
    # By default within the first entry of the archive
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def _losses(output_dir: Path) -> dict[int, float]:
    return {m["Step"]: m["NLL Loss"] for m in read_metrics(output_dir, "train")}


@pytest.mark.parametrize("kind", _STATES)
def test_damaged_checkpoint_is_named_with_the_way_out(
    tiny_data: TinyData, run_dir: Path, kind: str
) -> None:
    file = run_dir / "checkpoints/step_8" / _STATES[kind]

    _flip_bit(file)

    with pytest.raises(DamagedCheckpointError) as info:
        pretrain(tiny_data, run_dir, _TWELVE)

    message = str(info.value)

    assert f"Training cannot continue from step 8: '{file}' is" in message
    assert f"remove '{run_dir / 'checkpoints/step_8'}': the same command" in message
    assert "continues from step 4, whose checkpoint is whole" in message


def test_way_out_of_a_damaged_checkpoint_gives_the_same_losses(
    tiny_data: TinyData, run_dir: Path
) -> None:
    before = _losses(run_dir)

    shutil.rmtree(run_dir / "checkpoints/step_8")

    pretrain(tiny_data, run_dir, _KEEP_TWO)

    assert [m["Step"] for m in read_metrics(run_dir, "train")][-4:] == [5, 6, 7, 8]
    assert _losses(run_dir) == before


def test_only_damaged_checkpoints_are_said_to_be_so(
    tiny_data: TinyData, run_dir: Path
) -> None:
    for step in (4, 8):
        os.truncate(run_dir / f"checkpoints/step_{step}" / _STATES["trainer"], 100)

    with pytest.raises(DamagedCheckpointError, match="No earlier checkpoint is whole"):
        pretrain(tiny_data, run_dir, _TWELVE)


def test_damaged_model_is_not_evaluated(run_dir: Path) -> None:
    file = run_dir / "checkpoints/step_8" / _STATES["model"]

    _flip_bit(file, file.stat().st_size // 2)

    # What torch would do
    assert torch.load(file, weights_only=True)

    with pytest.raises(DamagedCheckpointError) as info:
        load_checkpoint(run_dir)

    message = str(info.value)

    assert f"'{file}' is damaged: " in message
    assert "checksum" in message
    assert "The checkpoint of step 4 is whole: set `step` to 4." in message

    assert load_checkpoint(run_dir, step=4).step == 4


def test_changed_model_card_is_not_believed(run_dir: Path) -> None:
    file = run_dir / "checkpoints/model.yaml"
    text = file.read_text()

    assert "num_heads: 2" in text
    file.write_text(text.replace("num_heads: 2", "num_heads: 4"))

    with pytest.raises(
        DamagedCheckpointError, match=r"step_8/hook/model.yaml' over it"
    ):
        load_checkpoint(run_dir)

    file.write_text("")

    with pytest.raises(DamagedCheckpointError, match="writes it anew"):
        load_checkpoint(run_dir)


@pytest.mark.parametrize("content", ["", "name: checkp"])
def test_model_card_that_a_kill_cut_is_written_anew(
    tiny_data: TinyData, run_dir: Path, content: str
) -> None:
    file = run_dir / "checkpoints/model.yaml"
    text = file.read_text()

    file.write_text(content)

    pretrain(tiny_data, run_dir, _KEEP_TWO)

    assert file.read_text() == text


def test_line_that_a_kill_cut_is_dropped(tiny_data: TinyData, run_dir: Path) -> None:
    before = read_metrics(run_dir, "train")

    with (run_dir / "metrics/train.jsonl").open("a") as file:
        file.write('{"Step": 9, "NLL')

    pretrain(tiny_data, run_dir, _TWELVE)

    metrics = read_metrics(run_dir, "train")

    assert metrics[: len(before)] == before
    assert [m["Step"] for m in metrics[len(before) :]] == [9, 10, 11, 12]


def test_directory_in_which_fairseq2_finds_nothing_is_refused(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"must not contain `\*`, `\?` or `\[`"):
        pretrain(tiny_data, tmp_path / "run[1]")


def test_training_stops_before_a_loss_that_is_not_finite(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = units._compute_loss

    num_calls = 0

    def compute_nan(model: Any, *args: Any) -> Any:
        nonlocal num_calls

        loss = compute(model, *args)

        if not model.training:
            return loss

        num_calls += 1
        if num_calls != 6:
            return loss

        terms: LossTerms = loss.terms
        z_loss = terms.aux_losses["router_z"] * float("inf")

        return loss._replace(
            terms=terms._replace(
                aux_losses={**terms.aux_losses, "router_z": z_loss},
                aggregate=terms.aggregate + z_loss,
            )
        )

    monkeypatch.setattr(units, "_compute_loss", compute_nan)

    with pytest.raises(NonFiniteLossError) as info:
        pretrain(tiny_data, tmp_path)

    message = str(info.value)

    assert "Training stops at step 6, before the update" in message
    assert (
        "NaN or infinite are the router_z loss, the total loss, the gradient."
        in message
    )
    assert "The last checkpoint is that of step 4" in message

    state = torch.load(tmp_path / "checkpoints/step_4" / _STATES["model"])
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (tmp_path / "checkpoints/step_8").exists()


def test_exit_code_of_a_loss_that_is_not_finite_is_3(
    tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {
        **tiny_data.pretrain_overrides,
        "model.config_overrides": "{_set_: {pad_idx: 1}}",
        "optimizer.config.lr": 1e30,
        "regime.publish_metrics_every_n_steps": 1,
    }

    code = _run(["lm", "pretrain", str(tmp_path), "--preset", "smoke"], config)

    err = capfd.readouterr().err

    assert code == 3
    assert re.search(r"Training stops at step \d+, before the update of its", err)
    assert "lower `optimizer.config.lr`" in err.lower()
    assert "Traceback" not in err


def _run(args: list[str], config: Mapping[str, object]) -> int | str | None:
    items = [f"{k}={'null' if v is None else v}" for k, v in config.items()]

    try:
        return main([*args, "--config", *items])
    except SystemExit as ex:
        return ex.code


def _fail_after(
    num_bytes: int, error: int, part: str
) -> Callable[[FSspecFileSystem, Path, Any], Any]:
    """Let writes fail as on a disk that is full, when so much is written."""
    original = FSspecFileSystem.open

    def open_file(self: FSspecFileSystem, path: Path, *args: Any, **kwargs: Any) -> Any:
        file = original(self, path, *args, **kwargs)

        if part not in str(path) or not file.writable():
            return file

        write = file.write
        left = num_bytes

        class Full:
            def write(self, data: Any) -> int:
                nonlocal left

                left -= len(data)
                if left < 0:
                    raise OSError(error, os.strerror(error))

                return int(write(data))

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Full()

    return open_file


@pytest.mark.parametrize("part", ["step_8.tmp/model", "step_8.tmp/trainer"])
def test_full_disk_is_said_and_leaves_the_checkpoints_as_they_are(
    tiny_data: TinyData,
    pretrained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    part: str,
) -> None:
    with monkeypatch.context() as context:
        context.setattr(FSspecFileSystem, "open", _fail_after(900, errno.ENOSPC, part))

        # What torch makes of an error in a file that is not its own
        with pytest.raises(CheckpointStateNotValidError):
            pretrain(tiny_data, tmp_path, _KEEP_TWO)

    err = capfd.readouterr().err

    assert "cannot be written: No space left on device." in err
    assert "it continues from the last checkpoint that was finished" in err
    assert "Traceback" not in err

    steps = sorted(d.name for d in tmp_path.glob("checkpoints/step_*"))
    assert steps == ["step_4", "step_8.tmp"]

    pretrain(tiny_data, tmp_path, _KEEP_TWO)

    assert _losses(tmp_path) == _losses(pretrained_dir)


def test_directory_that_cannot_be_written_is_said(
    tiny_data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OperationalError):
        pretrain(tiny_data, Path("/proc/moxe_plugin/run"))

    err = capfd.readouterr().err

    assert "'/proc/moxe_plugin" in err
    assert "Traceback" not in err


_JOIN_TIMEOUT_S: Final = 90


def _pretrain_rank(
    data: TinyData, output_dir: Path, rank: int, port: int, dies_at: int | None
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )

    output_dir.mkdir(parents=True, exist_ok=True)
    sys.stderr = (output_dir.parent / f"err_{rank}").open("a")

    set_step_nr = units.CausalLMTrainUnit.set_step_nr

    def set_or_die(self: units.CausalLMTrainUnit, step_nr: int) -> None:
        if step_nr == dies_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

        set_step_nr(self, step_nr)

    units.CausalLMTrainUnit.set_step_nr = set_or_die  # type: ignore[method-assign]

    pretrain(data, output_dir, _KEEP_TWO)


def _pretrain_with_two(
    data: TinyData, output_dir: Path, dies_at: int | None
) -> list[int | None]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    processes = [
        get_context("fork").Process(
            target=_pretrain_rank, args=(data, output_dir, rank, store.port, dies_at)
        )
        for rank in range(2)
    ]

    for process in processes:
        process.start()

    began = time.monotonic()
    for process in processes:
        process.join(timeout=max(1.0, _JOIN_TIMEOUT_S + began - time.monotonic()))

    codes = [process.exitcode for process in processes]

    for process in processes:
        process.kill()

    return codes


def test_lost_process_ends_the_other_and_a_restart_gives_the_same_losses(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    output_dirs = [tmp_path / name / "run" for name in ("undisturbed", "disturbed")]

    assert _pretrain_with_two(tiny_data, output_dirs[0], None) == [0, 0]

    codes = _pretrain_with_two(tiny_data, output_dirs[1], 7)

    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (None, 0)

    err = (output_dirs[1].parent / "err_0").read_text()

    assert "Another process of this run has died or cannot be reached" in err

    assert _pretrain_with_two(tiny_data, output_dirs[1], None) == [0, 0]

    expected = _losses(output_dirs[0])

    for metrics in read_metrics(output_dirs[1], "train"):
        assert metrics["NLL Loss"] == expected[metrics["Step"]]

    assert _losses(output_dirs[1]) == expected
