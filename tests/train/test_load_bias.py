"""The bias of `loss_free` selection in training: one process, two, and continued."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairseq2.datasets import SequenceBatch
from fairseq2.gang import FakeGang, Gangs, create_fsdp_gangs
from fairseq2.metrics import MetricBag
from fairseq2.nn.ddp import to_ddp
from fairseq2.nn.fsdp import FSDPWrapper, to_fsdp2
from fairseq2.nn.fsdp.fsdp2 import fsdp2_local_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from moxe_plugin.models.moxe import MoxELM
from moxe_plugin.models.parallel import apply_ac_to_decoder, apply_fsdp_to_decoder
from moxe_plugin.nn.loss_free import LossFreeSelection
from moxe_plugin.train.units import CausalLMEvalUnit, CausalLMTrainUnit
from tests.models.families import create_model
from tests.processes import make_gangs, run_processes
from tests.train.tiny_data import TinyData, pretrain

CPU = torch.device("cpu")

NUM_PROCESSES = 2

RATE = 1e-3


def _create() -> MoxELM:
    torch.manual_seed(2)

    model = create_model("moxe", "tiny_loss_free", dtype=torch.float32)
    assert isinstance(model, MoxELM)

    model.requires_grad_(True)

    return model


def _biases(model: MoxELM) -> Tensor:
    rules = [m for m in model.modules() if isinstance(m, LossFreeSelection)]

    return torch.stack([_full(rule.load_bias) for rule in rules]).detach()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _make_batch(seed: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)

    seqs = torch.randint(3, 256, (3, 9), generator=generator)

    return SequenceBatch(seqs, [9, 4 + seed, 2])


class _Step:
    """A training step of several batches, as fairseq2's trainer does it."""

    def __init__(self, dp_model: Module, model: MoxELM) -> None:
        self._unit = CausalLMTrainUnit(dp_model, model)
        self._bag = MetricBag(CPU)
        self._unit.prepare_metric_bag(self._bag)

        self._optimizer = torch.optim.AdamW(
            dp_model.parameters(), lr=1e-3, weight_decay=0.1
        )

    def __call__(self, gang: Any, step_nr: int, seeds: list[int]) -> None:
        self._unit.set_step_nr(step_nr)

        for seed in seeds:
            loss, _ = self._unit.process_batch(_make_batch(seed), self._bag)
            torch.autograd.backward(loss)

        self._optimizer.step()
        self._unit.finish_step(gang)
        self._optimizer.zero_grad()


def _count_loads(model: MoxELM, seeds: list[int]) -> Tensor:
    loads = torch.zeros(2, 4, dtype=torch.int64)

    for seed in seeds:
        inputs, _ = _make_batch(seed).as_auto_regressive()
        seqs, layout = inputs.as_input()

        with torch.no_grad():
            _, routings = model.trace(seqs, layout)

        mask = (layout.position_indices >= 0).flatten()

        for row, routing in zip(loads, routings, strict=True):
            row += routing.expert_indices[mask].flatten().bincount(minlength=4)

    return loads


@pytest.mark.usefixtures("fairseq2_setup")
def test_step_moves_the_bias_once_by_the_load_of_all_its_batches() -> None:
    model = _create()
    gang = FakeGang(CPU)

    loads = _count_loads(model, [0, 1, 2])
    expected = RATE * (loads.float().mean(dim=1, keepdim=True) - loads).sign()
    assert expected.any()

    step = _Step(model, model)
    step(gang, 1, [0, 1, 2])

    torch.testing.assert_close(_biases(model), expected)

    loads = _count_loads(model, [0])
    expected += RATE * (loads.float().mean(dim=1, keepdim=True) - loads).sign()

    # The optimizer, weight decay included, leaves it alone.
    step(gang, 2, [0])

    torch.testing.assert_close(_biases(model), expected)


@pytest.mark.usefixtures("fairseq2_setup")
def test_evaluation_and_abandoned_steps_do_not_move_the_bias() -> None:
    model = _create()
    unit, bag = CausalLMTrainUnit(model, model), MetricBag(CPU)
    unit.prepare_metric_bag(bag)

    unit.set_step_nr(1)
    unit.process_batch(_make_batch(0), bag)
    # No optimizer step: fp16 overflowed.
    unit.set_step_nr(1)

    model.eval()
    eval_unit, eval_bag = CausalLMEvalUnit(model, model), MetricBag(CPU)
    eval_unit.prepare_metric_bag(eval_bag)
    eval_unit.process_batch(_make_batch(1), eval_bag)

    unit.finish_step(FakeGang(CPU))

    assert not _biases(model).any()


def _to_checkpointed_fsdp(model: Module, gangs: Gangs) -> Module:
    model = apply_ac_to_decoder(model, every_nth_layer=1)

    def apply(module: Module, wrapper: FSDPWrapper) -> Module:
        return apply_fsdp_to_decoder(module, "layer", wrapper)

    return to_fsdp2(model, gangs, apply)


def _train_in_two_processes() -> None:
    ddp_gangs = make_gangs()

    rank = ddp_gangs.root.rank

    model = _create()
    loads = _count_loads(model, [0, 1, 2, 3])
    expected = RATE * (loads.float().mean(dim=1, keepdim=True) - loads).sign()

    for mode in ("ddp", "fsdp"):
        model = _create()

        if mode == "ddp":
            gangs = ddp_gangs
            dp_model: Module = to_ddp(model, gangs)
        else:
            gangs = create_fsdp_gangs(ddp_gangs)
            dp_model = _to_checkpointed_fsdp(model, gangs)

        step = _Step(dp_model, model)
        # Two batches in each process
        step(gangs.dp, 1, [rank, 2 + rank])

        torch.testing.assert_close(_biases(model), expected, msg=mode)

        step(gangs.dp, 2, [rank])

        # All processes agree.
        biases = _biases(model)
        others = [torch.empty_like(biases) for _ in range(NUM_PROCESSES)]
        dist.all_gather(others, biases)

        assert torch.equal(others[0], others[1]), mode
        assert not torch.equal(biases, expected), mode

        if mode == "fsdp":
            _check_shards(dp_model, biases[0])


def _check_shards(dp_model: Any, bias: Tensor) -> None:
    # fairseq2 writes the shard of each process, and reads their concatenation.
    state = fsdp2_local_state_dict(dp_model)

    (shard,) = (
        v for n, v in state.items() if n.endswith("layers.0.router.selection.load_bias")
    )
    assert isinstance(shard, Tensor)
    assert len(shard) == 2

    shards = [torch.empty_like(shard) for _ in range(NUM_PROCESSES)]
    dist.all_gather(shards, shard.detach())

    assert torch.equal(torch.cat(shards), bias)


@pytest.mark.usefixtures("fairseq2_setup")
def test_two_processes_follow_the_load_of_both() -> None:
    run_processes(NUM_PROCESSES, _train_in_two_processes)


def _load_state(output_dir: Path, step: int) -> dict[str, Tensor]:
    step_dir = output_dir / "checkpoints" / f"step_{step}"

    file = step_dir / "model" / "pp_00" / "tp_00" / "sdp_00.pt"

    state: dict[str, Tensor] = torch.load(file, weights_only=True)

    return state


def test_continued_run_has_the_bias_of_an_uninterrupted_one(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = []

    adjust = MoxELM.adjust_to_loads

    def record(model: MoxELM, expert_loads: Tensor) -> None:
        totals.append(expert_loads.sum(dim=1).tolist())

        adjust(model, expert_loads)

    monkeypatch.setattr(MoxELM, "adjust_to_loads", record)

    overrides = {
        "model.arch": "tiny_loss_free",
        "trainer.grad_accumulation.num_batches": 2,
        "lr_scheduler.config.num_warmup_steps": 1,
        "regime.num_steps": 4,
        "regime.validate_every_n_steps": 2,
        "regime.checkpoint_every_n_steps": 2,
        "regime.keep_last_n_checkpoints": 2,
    }

    whole, continued = tmp_path / "whole", tmp_path / "continued"

    pretrain(tiny_data, whole, overrides)

    # Once per step: two batches of 4 x 16 tokens, two experts each, in both layers
    assert totals == [[256, 256]] * 4

    shutil.copytree(whole, continued)
    shutil.rmtree(continued / "checkpoints" / "step_4")

    pretrain(tiny_data, continued, overrides)

    assert len(totals) == 6

    expected, actual = _load_state(whole, 4), _load_state(continued, 4)

    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[n], expected[n]) for n in expected)

    before, after = (_load_state(whole, n) for n in (2, 4))
    name = "decoder.layers.1.router.selection.load_bias"

    assert before[name].any()
    assert not torch.equal(before[name], after[name])

    # Steps of the rate, upwards and downwards
    multiples = after[name] / RATE
    torch.testing.assert_close(multiples, multiples.round(), atol=1e-3, rtol=0.0)
    assert after[name].min() < 0.0 < after[name].max()
