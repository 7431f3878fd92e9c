"""Runs recipes in several processes: they train what a single process trains."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.metrics import MetricBag
from fairseq2.nn import BatchLayout
from fairseq2.recipe.error import RecipeError
from torch import Tensor

from moxe_plugin.cli import main
from moxe_plugin.data.reader import RowReader
from moxe_plugin.eval.checkpoints import load_checkpoint
from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.selection import TopKSelection
from moxe_plugin.train.units import CausalLMTrainUnit
from tests.common import assert_close
from tests.processes import run_processes
from tests.train.tiny_data import TWO_STEPS, TinyData, pretrain, read_metrics

NUM_ACCUMULATE: Final = 3

OVERRIDES: Final[Mapping[str, object]] = {
    "dataset.batch_size": 2,
    "trainer.grad_accumulation.num_batches": NUM_ACCUMULATE,
    "regime.num_steps": 12,
    "regime.validate_every_n_steps": 6,
    "regime.checkpoint_every_n_steps": 6,
    "regime.keep_last_n_checkpoints": 2,
}
"""An epoch ends within step 9, whose last batch is missing."""

LAUNCH_METRICS: Final = ("Time", "Second", "Batch Size", "per Batch", "Gradient Norm")
"""Parts of the names of metrics that tell of time, or of batches per process."""


def _starve_experts(
    monkeypatch: pytest.MonkeyPatch, is_starving: Callable[[], bool]
) -> None:
    # All tokens of a starving batch go to experts 0 and 1. A router in C++ does not ask
    # its selection.
    monkeypatch.setattr(DifficultyRouter, "_route_natively", lambda *_: None)
    select = TopKSelection.forward

    def forward(self: TopKSelection, probs: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and is_starving():
            has_no_token = torch.arange(probs.size(1)) >= 2
            probs = probs.masked_fill(has_no_token, 0.0)

        return select(self, probs)

    monkeypatch.setattr(TopKSelection, "forward", forward)


def _pretrain_rank(
    data: TinyData, output_dir: Path, overrides: Mapping[str, object]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _starve_experts(monkeypatch, lambda: os.environ["RANK"] == "1")

        pretrain(data, output_dir, {**OVERRIDES, **overrides})


def _read_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    # A single process reads what two would read, one after the other.
    init = RowReader.__init__

    def create(self: RowReader, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

        self._num_batches -= self._num_batches % 2

    def read_batch(self: RowReader, batch_nr: int) -> SequenceBatch:
        size = self._global_batch_size

        both = self._make_order()[batch_nr // 2 * 2 * size :][: 2 * size]

        return self._rows.collate(both[batch_nr % 2 :: 2])

    monkeypatch.setattr(RowReader, "__init__", create)
    monkeypatch.setattr(RowReader, "_read_batch", read_batch)


def _pretrain_as_two(data: TinyData, output_dir: Path) -> None:
    num_batches = 0

    process_batch = CausalLMTrainUnit.process_batch

    def process(
        self: CausalLMTrainUnit, batch: SequenceBatch, bag: MetricBag
    ) -> tuple[Tensor, int]:
        nonlocal num_batches

        num_batches += 1

        return process_batch(self, batch, bag)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(CausalLMTrainUnit, "process_batch", process)

        _starve_experts(monkeypatch, lambda: num_batches % 2 == 0)
        _read_as_two(monkeypatch)

        overrides = {
            "trainer.grad_accumulation.num_batches": 2 * NUM_ACCUMULATE,
            # Of all processes, where the others' is of each
            "dataset.max_num_valid_batches": 4,
        }

        pretrain(data, output_dir, {**OVERRIDES, **overrides})


def _select(metrics: dict[str, Any], excluded: tuple[str, ...]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, float) and not any(part in name for part in excluded)
    }


class Run(NamedTuple):
    """A run of two processes."""

    output_dir: Path
    overrides: Mapping[str, object]


@pytest.fixture(scope="module")
def single_dir(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in a single process on the batches of two.

    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory.
    """
    output_dir = tmp_path_factory.mktemp("distributed") / "single"

    _pretrain_as_two(tiny_data, output_dir)

    return output_dir


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def run(
    request: pytest.FixtureRequest,
    tiny_data: TinyData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Train in two processes; experts 2 and 3 get no token in the second one.

    :param request: Has the kind of data parallelism.
    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The run.
    """
    output_dir = tmp_path_factory.mktemp("distributed") / request.param

    overrides = {"trainer.data_parallelism": request.param}

    run_processes(2, _pretrain_rank, tiny_data, output_dir, overrides)

    return Run(output_dir, overrides)


def test_two_processes_have_the_losses_of_one(run: Run, single_dir: Path) -> None:
    for category, steps in {"train": list(range(1, 13)), "valid": [6, 12]}.items():
        expected, actual = (
            read_metrics(d, category) for d in (single_dir, run.output_dir)
        )

        assert [m["Step"] for m in actual] == steps

        for actual_metrics, expected_metrics in zip(actual, expected, strict=True):
            selected = _select(actual_metrics, LAUNCH_METRICS)

            assert {"NLL Loss", "Load Balance Loss", "layer_1/idle_experts"} < set(
                selected
            )
            assert selected == pytest.approx(
                _select(expected_metrics, LAUNCH_METRICS), rel=1e-5, abs=1e-7
            )

    # Two experts without a token in every batch of one process of two
    assert all(
        m["layer_1/idle_experts"] >= 1.0 for m in read_metrics(single_dir, "train")
    )


def test_continued_run_is_bitwise_the_same(
    run: Run, tiny_data: TinyData, tmp_path: Path
) -> None:
    shutil.copytree(run.output_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step_12")

    run_processes(2, _pretrain_rank, tiny_data, tmp_path, run.overrides)

    metrics = [_select(m, ("Time", "Second")) for m in read_metrics(tmp_path, "train")]

    assert len(metrics) == 18
    assert metrics[12:] == metrics[6:12]


def _refuse(data: TinyData, output_dir: Path, overrides: Mapping[str, object]) -> str:
    with pytest.raises(RecipeError) as exc_info:
        pretrain(data, output_dir, {**OVERRIDES, **overrides})

    return str(exc_info.value)


def test_fewer_processes_continue_or_are_refused(
    run: Run, tiny_data: TinyData, tmp_path: Path
) -> None:
    shutil.copytree(run.output_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step_12")

    if "fsdp" in run.overrides.values():
        message = _refuse(tiny_data, tmp_path, run.overrides)

        assert (
            f"The checkpoint '{tmp_path}/checkpoints/step_6' is of 2 processes and 2 "
            "shards of the model, but this run has 1 process and 1 shard of the model."
        ) in message
        assert "by `torchrun --nproc-per-node 2` with the same" in message

        return

    pretrain(tiny_data, tmp_path, {**OVERRIDES, **run.overrides})

    metrics = read_metrics(tmp_path, "train")

    assert [m["Step"] for m in metrics[12:]] == list(range(7, 13))
    assert metrics[-1]["NLL Loss"] < metrics[5]["NLL Loss"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_more_processes_or_shards_are_refused(
    run: Run, tiny_data: TinyData, mode: str
) -> None:
    other = {"trainer.data_parallelism": mode}

    num_processes = 3 if other == run.overrides else 2

    messages = run_processes(num_processes, _refuse, tiny_data, run.output_dir, other)

    assert len(set(messages)) == 1
    assert f"but this run has {num_processes} processes" in messages[0]


def test_message_tells_how_to_go_on_with_the_parameters(
    run: Run, tiny_data: TinyData, tmp_path: Path
) -> None:
    other = {"trainer.data_parallelism": "fsdp"}

    (message, _, _) = run_processes(3, _refuse, tiny_data, run.output_dir, other)

    *_, name, directory = message.split("`")[-2].split()

    overrides = {
        **dict(part.split("=") for part in (name, directory)),
        "trainer.grad_accumulation.num_batches": 6,
        "lr_scheduler.config.num_warmup_steps": 1,
        "regime.num_steps": 2,
        "dataset.valid_split": None,
    }

    pretrain(tiny_data, tmp_path, {**OVERRIDES, **overrides})

    (first, _), before = (read_metrics(d, "train") for d in (tmp_path, run.output_dir))

    assert first["NLL Loss"] < before[5]["NLL Loss"]


def test_checkpoint_of_two_processes_loads_as_a_model(
    run: Run, single_dir: Path
) -> None:
    seqs = torch.arange(3, 300).view(9, 33)

    losses = []

    for output_dir in (run.output_dir, single_dir):
        model = load_checkpoint(output_dir, device=torch.device("cpu")).model

        loss = model(seqs, BatchLayout.of(seqs), seqs, reduction="mean")

        losses.append(loss.detach())

    assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)


def test_hybrid_shards_train_the_same_and_continue(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    overrides = {
        "dataset.batch_size": 2,
        "lr_scheduler.config.num_warmup_steps": 1,
        "regime.num_steps": 4,
        "regime.validate_every_n_steps": 4,
        "regime.checkpoint_every_n_steps": 2,
        "regime.keep_last_n_checkpoints": 2,
    }
    hybrid = {
        **overrides,
        "trainer.data_parallelism": "fsdp",
        "trainer.fsdp.hybrid": True,
    }

    ddp_dir, hybrid_dir = tmp_path / "ddp", tmp_path / "hybrid"

    run_processes(4, pretrain, tiny_data, ddp_dir, overrides)

    for _ in range(2):
        # Two hosts of two processes
        run_processes(4, pretrain, tiny_data, hybrid_dir, hybrid, num_local_processes=2)

        step_dir = hybrid_dir / "checkpoints" / "step_4"

        shards = sorted(f.name for f in step_dir.glob("model/*/*/*"))
        assert shards == ["sdp_00.pt", "sdp_01.pt"]

        shutil.rmtree(step_dir)

    expected, actual = (
        [_select(m, LAUNCH_METRICS) for m in read_metrics(d, "train")]
        for d in (ddp_dir, hybrid_dir)
    )

    assert actual[4:] == actual[2:4]

    for actual_metrics, expected_metrics in zip(actual[:4], expected, strict=True):
        assert actual_metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)


def _pretrain_under_slurm(data: TinyData, output_dir: Path) -> None:
    # What `srun --ntasks-per-node 2` sets, where `torchrun` sets others
    for name, slurm_name in {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "WORLD_SIZE": "SLURM_NTASKS",
        "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    }.items():
        os.environ[slurm_name] = os.environ.pop(name)

    os.environ["SLURM_JOB_ID"] = "7"

    pretrain(data, output_dir, TWO_STEPS)


def test_processes_of_a_slurm_job_find_each_other(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    run_processes(2, _pretrain_under_slurm, tiny_data, tmp_path)

    # Each process logs into a file of its own.
    logs = sorted(file.name for file in tmp_path.glob("logs/rank_*.log"))

    assert logs == ["rank_0.log", "rank_1.log"]

    (first, _) = read_metrics(tmp_path, "train")

    assert first["Total Number of Examples"] == 8


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_global_balance_losses_are_those_of_one_large_batch(
    tiny_data: TinyData, tmp_path: Path, mode: str
) -> None:
    overrides: dict[str, object] = {
        "balance_over": "global",
        "dataset.batch_size": 4,
        "dataset.valid_split": None,
        "trainer.grad_accumulation.num_batches": 2,
        # Large enough to tell
        "model.config_overrides": {"pad_idx": 1, "load_balance_loss_scale": 1.0},
    }

    single_dir, output_dir = tmp_path / "single", tmp_path / "two"

    pretrain(tiny_data, single_dir, overrides)

    overrides |= {"dataset.batch_size": 2, "trainer.data_parallelism": mode}

    run_processes(2, pretrain, tiny_data, output_dir, overrides)

    # Means over batches of what is no mean over tokens
    excluded = (*LAUNCH_METRICS, "idle_experts", "busiest")

    expected, actual = (
        [_select(m, excluded) for m in read_metrics(d, "train")]
        for d in (single_dir, output_dir)
    )

    for actual_metrics, expected_metrics in zip(actual, expected, strict=True):
        assert "Group Loss" in actual_metrics
        assert actual_metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)


def test_global_balance_of_a_model_without_experts_is_refused(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="`balance_over` must be 'local' for this"):
        pretrain(
            tiny_data, tmp_path, {"model.family": "xlstm", "balance_over": "global"}
        )


def _run_command(args: list[str]) -> int:
    with pytest.raises(SystemExit) as exc_info:
        main(args)

    assert isinstance(exc_info.value.code, int)

    return exc_info.value.code


@pytest.mark.parametrize(
    "command",
    [
        "pretrain OUT --preset smoke",
        "instruction_finetune OUT --from RUN",
        "generate OUT --from RUN --prompt The",
        "chat OUT --from RUN",
    ],
    ids=["pretrain", "instruction_finetune", "generate", "chat"],
)
def test_tensor_parallelism_is_refused_by_every_command(
    pretrained_dir: Path, tmp_path: Path, command: str
) -> None:
    places = {"OUT": str(tmp_path), "RUN": str(pretrained_dir)}

    args = [places.get(word, word) for word in command.split()]
    args += ["--config", "gang.tensor_parallel_size=2", "--quiet"]

    assert run_processes(2, _run_command, ["lm", *args]) == [2, 2]

    log = tmp_path.joinpath("logs", "rank_0.log").read_text()

    assert "`gang.tensor_parallel_size` must be 1, since no model family" in log
    assert "Traceback" not in log
