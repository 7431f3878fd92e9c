"""What is measured of a case; nothing here depends on how fast the machine is."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
)

from moxe_plugin.models.captured_steps import CapturedStepsLM
from moxe_plugin.models.flops import forward_flops_per_token
from moxe_plugin.nn import products
from moxe_plugin.speed import measuring, memory, workloads
from moxe_plugin.speed.clock import time_repeats
from moxe_plugin.speed.measuring import describe_machine, measure_case
from moxe_plugin.speed.options import MeasureOptions
from moxe_plugin.speed.records import SpeedRow
from moxe_plugin.speed.suites import Phase, SpeedCase
from tests.models.captured_cases import Captures
from tests.models.families import FAMILIES, create_model, get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

_MACHINE = {
    "matmul_gflop_per_s": {"float32": 2.0, "bfloat16": 4.0},
    "copy_gb_per_s": 8.0,
    "new_memory_gb_per_s": 0.5,
}


def _case(family: str, phase: Phase, **kwargs: Any) -> SpeedCase:
    fields = {"batch": 2, "length": 12, "arch": "tiny", **kwargs}

    return SpeedCase(suite="test", family=family, phase=phase, **fields)


def _measure(case: SpeedCase, device: torch.device, **kwargs: Any) -> SpeedRow:
    fields = {"repeats": 2, "decode_tokens": 3, "chunk_len": 5, **kwargs}

    return measure_case(case, _MACHINE, MeasureOptions(device=device, **fields))


@pytest.mark.parametrize(
    ("phase", "tokens", "passes"),
    [("train", 24, 3), ("prefill", 24, 1), ("decode", 6, 1)],
    ids=["train", "prefill", "decode"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_forward_pass(
    family: str, phase: Phase, tokens: int, passes: int, device: torch.device
) -> None:
    row = _measure(_case(family, phase), device)

    flops = passes * tokens * forward_flops_per_token(get_arch(family, "tiny"), 12)

    assert row.tokens == tokens
    assert row.useful_gflop == pytest.approx(flops / 1e9)
    assert row.num_parameters == sum(
        p.numel() for p in create_model(family).parameters()
    )


@pytest.mark.parametrize("family", ["moxe", "xlstm"])
def test_steps_are_captured_before_any_call(
    family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = Captures()
    monkeypatch.setattr(
        workloads, "CapturedStepsLM", partial(CapturedStepsLM, capture=captures)
    )
    num_captured = []

    def time_and_tell(*args: Any) -> list[float]:
        num_captured.append(captures.num_captured)

        return time_repeats(*args)

    monkeypatch.setattr(measuring, "time_repeats", time_and_tell)

    row = _measure(_case(family, "decode", captured=True), device, warm_up=0)

    # Of 12 tokens, the one after two chunks and the last, and six of the calls
    assert (captures.num_captured, captures.num_replayed) == (1, 8)
    assert set(num_captured) == {1}
    assert row.captured
    assert row.state_bytes == _measure(_case(family, "decode"), device).state_bytes


def test_rates_follow_from_the_median(device: torch.device) -> None:
    row = _measure(_case("xlstm", "train", optimizer=True), device, repeats=3)

    assert row.seconds == statistics.median(row.seconds_all)
    assert row.seconds is not None
    assert row.useful_gflop is not None
    assert len(row.seconds_all) == 3
    assert row.tokens_per_s == pytest.approx(24 / row.seconds)
    assert row.peak_fraction == pytest.approx(row.useful_gflop / row.seconds / 2.0)


@pytest.mark.parametrize(("precision", "peak"), [("bfloat16", 4.0), ("autocast", 4.0)])
@pytest.mark.parametrize("phase", ["train", "decode"])
def test_other_precisions_are_compared_with_their_own_peak(
    phase: Phase, precision: str, peak: float, device: torch.device
) -> None:
    row = _measure(_case("moxe", phase), device, precision=precision)

    assert row.seconds is not None
    assert row.useful_gflop is not None
    assert row.peak_fraction == pytest.approx(row.useful_gflop / row.seconds / peak)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_only_the_state_of_moxe_stays_as_it_is(
    phase: Phase, device: torch.device
) -> None:
    # The first is beyond the window of Gemma 2, the second beyond its `max_seq_len`.
    lengths = (16, 80)

    moxe, gemma2 = (
        [
            _measure(_case(family, phase, length=length), device).state_bytes
            for length in lengths
        ]
        for family in ("moxe", "gemma2")
    )

    assert moxe[0] == moxe[1]
    assert gemma2[0] is not None
    assert gemma2[1] is not None
    # One layer has no window: keys and values, 2 sequences, 2 heads, 8 wide, float32.
    assert gemma2[1] - gemma2[0] == (80 - 16) * 2 * 2 * 2 * 8 * 4


def test_training_has_no_state(device: torch.device) -> None:
    assert _measure(_case("moxe", "train"), device).state_bytes is None


def test_only_training_moves_gradients(device: torch.device) -> None:
    train, decode = (_measure(_case("xlstm", p), device) for p in ("train", "decode"))

    assert train.num_parameters is not None
    assert train.least_memory_seconds is not None
    num_bytes = 4 * train.num_parameters
    assert train.new_gradient_seconds == pytest.approx(num_bytes / 0.5e9)
    assert num_bytes / 8e9 < train.least_memory_seconds < 3 * num_bytes / 8e9

    assert decode.least_memory_seconds is None
    assert decode.new_gradient_seconds is None


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_routers_can_be_made_uneven(phase: Phase, device: torch.device) -> None:
    even, uneven = (
        _measure(_case("moxe", phase), device, router_skew=skew) for skew in (0.0, 50.0)
    )

    assert (even.router_skew, uneven.router_skew) == (0.0, 50.0)
    assert even.busiest_expert_share is not None
    # Offsets this large leave a token no choice; two experts share the load.
    assert uneven.busiest_expert_share == pytest.approx(0.5)
    assert even.useful_gflop == uneven.useful_gflop


def test_other_systems_have_no_routers_to_skew(device: torch.device) -> None:
    row = _measure(_case("qwen_moe", "decode"), device, router_skew=50.0)

    assert row.router_skew == 0.0
    assert row.busiest_expert_share is None


def test_our_products_are_in_place_while_a_case_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_products = []
    original = products.multiply

    def multiply(lhs: Tensor, rhs: Tensor) -> Tensor:
        num_products.append(1)

        return original(lhs, rhs)

    monkeypatch.setattr(products, "multiply", multiply)

    cpu = torch.device("cpu")
    assert _measure(_case("gemma2", "train"), cpu).linear == "own"
    assert not num_products

    assert _measure(_case("gemma2", "train", linear="swapped"), cpu).linear == "swapped"
    assert num_products


def test_experts_can_be_added(device: torch.device) -> None:
    few, many = (
        _measure(_case("moxe", "train", overrides={"num_experts": n}), device)
        for n in (4, 8)
    )

    assert few.num_parameters is not None
    assert many.num_parameters is not None
    assert many.num_parameters > few.num_parameters


def test_peak_is_not_told_where_it_cannot_be_reset(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(memory, "reset_peak_memory", lambda _: False)

    assert _measure(_case("xlstm", "train"), device).peak_memory_gib is None


def test_peak_is_that_of_the_time_after_its_reset() -> None:
    cpu = torch.device("cpu")

    if not memory.reset_peak_memory(cpu):
        pytest.skip("The peak of this process cannot be reset.")

    num_bytes = 256 * 2**20

    torch.ones(num_bytes, dtype=torch.uint8)
    before = memory.read_peak_memory(cpu)
    # A test that trained lets the process keep it.
    memory.release_memory(cpu)
    assert memory.reset_peak_memory(cpu)
    after = memory.read_peak_memory(cpu)

    assert before is not None
    assert after is not None
    assert before - after > num_bytes // 2


def test_too_little_memory_leaves_no_numbers(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measuring, "prepare_workload", fail)

    row = _measure(_case("xlstm", "train"), device)

    assert row.tokens_per_s is None
    assert row.seconds_all == ()
    assert (row.family, row.length) == ("xlstm", 12)


def test_machine_is_described(device: torch.device) -> None:
    options = MeasureOptions(device=device, matmul_size=16, copy_bytes=2**16)
    machine = describe_machine(options)

    assert machine["num_threads"] == torch.get_num_threads()
    assert machine["num_cores"] >= 1
    assert machine["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert machine["matmul_size"] == 16
    assert all(machine["matmul_gflop_per_s"][t] > 0 for t in ("float32", "bfloat16"))
    assert machine["copy_gb_per_s"] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "fp8"}, "`dtype` must be one of float32, .*, but is 'fp8'"),
        ({"repeats": 0}, "`repeats` must be greater than or equal to 1, but is 0"),
        ({"warm_up": -1}, "`warm_up` must be greater than or equal to 0, but is -1"),
        ({"router_skew": -0.5}, "`router_skew` must be finite and .*, but is -0.5"),
        ({"router_skew": float("nan")}, "`router_skew` must be finite .* is nan"),
        ({"copy_bytes": 0}, "`copy_bytes` must be greater than or equal to 1"),
        ({"device": torch.device("meta")}, "`device` must be cpu or cuda, .* 'meta'"),
        ({"allocator": "pool"}, "`allocator` must be kept or system, but is 'pool'"),
    ],
    ids=[
        *("dtype", "repeats", "warm_up", "negative_skew", "no_skew", "copy", "device"),
        "allocator",
    ],
)
def test_mistakes_are_named(kwargs: dict[str, Any], message: str) -> None:
    options = MeasureOptions(**{"device": torch.device("cpu"), **kwargs})

    with pytest.raises(ValueError, match=message):
        options.check()


def test_unknown_architecture_is_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match="'moxe' has no 'huge'"):
        _measure(_case("moxe", "train", arch="huge"), device)


def test_override_that_does_not_fit_is_explained(device: torch.device) -> None:
    case = _case("moxe", "train", overrides={"num_experts": 1})

    with pytest.raises(ValueError, match=r"'num_experts': 1.*must fit.*`top_k`"):
        _measure(case, device)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_can_keep_the_inputs_of_layers_only(
    family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_runs = []
    forward = CheckpointWrapper.forward

    def count(self: CheckpointWrapper, *args: Any, **kwargs: Any) -> Any:
        num_runs.append(1)

        return forward(self, *args, **kwargs)  # type: ignore[no-untyped-call]  # torch

    monkeypatch.setattr(CheckpointWrapper, "forward", count)

    row = _measure(_case(family, "train"), device, checkpoint_layers=True)

    assert row.checkpoint_layers
    assert row.tokens_per_s is not None
    assert num_runs

    assert not _measure(
        _case(family, "decode"), device, checkpoint_layers=True
    ).checkpoint_layers
