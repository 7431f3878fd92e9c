"""Reads back what training has written for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.device import CPU
from fairseq2.gang import FakeGang
from tensorboard.backend.event_processing.event_accumulator import (
    HISTOGRAMS,
    EventAccumulator,
)

from moxe_plugin.train.routing_recorder import LoadHistory, RoutingRecorder
from tests.train.tiny_data import TWO_STEPS, TinyData, pretrain, read_metrics

_TENSORBOARD = "common.metric_recorders.tensorboard.enabled"


def _read_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={HISTOGRAMS: 0})
    events.Reload()

    return events


def _read_shares(events: EventAccumulator, layer: int) -> dict[int, list[float]]:
    """Read the share of each expert, by step."""
    shares = {}

    for event in events.Histograms(f"layer_{layer}/experts"):
        histogram: Any = event.histogram_value

        assert histogram.min == -0.5
        assert list(histogram.bucket_limit) == [
            idx + 0.5 for idx in range(len(histogram.bucket))
        ]

        shares[event.step] = list(histogram.bucket)

    return shares


@pytest.fixture(scope="module")
def moxe_dir(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny MoxE for two steps with TensorBoard.

    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory.
    """
    output_dir = tmp_path_factory.mktemp("tensorboard") / "run"

    pretrain(tiny_data, output_dir, {**TWO_STEPS, _TENSORBOARD: True})

    return output_dir


def test_scalars_are_those_of_the_metric_files(moxe_dir: Path) -> None:
    for category in ("train", "valid"):
        events = _read_events(moxe_dir / "tb" / category)

        for metrics in read_metrics(moxe_dir, category):
            for name in ("NLL Loss", "layer_0/mlstm_share", "layer_1/router_entropy"):
                by_step = {e.step: e.value for e in events.Scalars(name)}

                assert by_step[metrics["Step"]] == pytest.approx(metrics[name])


def test_histograms_agree_with_the_metric_files(moxe_dir: Path) -> None:
    events = _read_events(moxe_dir / "tb" / "routing")

    assert events.Tags()["histograms"] == ["layer_0/experts", "layer_1/experts"]

    for layer in range(2):
        shares = _read_shares(events, layer)

        assert sorted(shares) == [1, 2]

        for metrics in read_metrics(moxe_dir, "train"):
            own = shares[metrics["Step"]]

            assert len(own) == 4
            assert sum(own) == pytest.approx(1.0)

            prefix = f"layer_{layer}"
            assert sum(own[:2]) == pytest.approx(metrics[f"{prefix}/mlstm_share"])
            assert max(own) == pytest.approx(metrics[f"{prefix}/busiest_expert_share"])
            assert own.count(0.0) == metrics[f"{prefix}/idle_experts"]


def test_a_histogram_sums_the_steps_of_its_interval(
    tiny_data: TinyData, moxe_dir: Path, tmp_path: Path
) -> None:
    overrides = {_TENSORBOARD: True, "regime.publish_metrics_every_n_steps": 2}

    pretrain(tiny_data, tmp_path / "run", {**TWO_STEPS, **overrides})

    for layer in range(2):
        events = _read_events(tmp_path / "run" / "tb" / "routing")
        single = _read_shares(_read_events(moxe_dir / "tb" / "routing"), layer)

        # Every step has the same number of tokens.
        mean = (torch.tensor(single[1]) + torch.tensor(single[2])) / 2

        assert _read_shares(events, layer) == {2: pytest.approx(mean.tolist())}


def test_families_without_a_router_write_no_histogram(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    overrides = {_TENSORBOARD: True, "model.family": "xlstm", "model.arch": "tiny"}

    pretrain(tiny_data, tmp_path, {**TWO_STEPS, **overrides})

    assert sorted(d.name for d in (tmp_path / "tb").iterdir()) == ["train", "valid"]


def test_nothing_is_written_without_tensorboard(pretrained_dir: Path) -> None:
    assert not (pretrained_dir / "tb").exists()


def test_loads_of_all_processes_are_summed_once_per_interval() -> None:
    history = LoadHistory(every_n_steps=3)
    gang = FakeGang(CPU, rank=0, size=2)

    taken = []
    for step_nr in range(1, 8):
        history.add(step_nr, torch.tensor([[step_nr, 1]]), gang)
        taken.append(history.take())

    assert [t is not None for t in taken] == [s in (3, 6) for s in range(1, 8)]

    # FakeGang takes all processes to have the same loads.
    assert taken[2] is not None
    assert taken[2].tolist() == [[2 * (1 + 2 + 3), 6]]
    assert taken[5] is not None
    assert taken[5].tolist() == [[2 * (4 + 5 + 6), 6]]


def test_validation_publishes_no_routing(tmp_path: Path) -> None:
    history = LoadHistory(every_n_steps=1)
    history.add(1, torch.tensor([[3, 1]]), FakeGang(CPU))

    recorder = RoutingRecorder(tmp_path / "routing", history)
    recorder.record_metric_values("valid", {}, 1)

    assert not (tmp_path / "routing").exists()

    recorder.record_metric_values("train", {}, 1)
    recorder.close()

    assert _read_shares(_read_events(tmp_path / "routing"), 0) == {1: [0.75, 0.25]}
