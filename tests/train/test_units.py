"""Checks the loss that a batch gives, and every metric that is recorded of it."""

from __future__ import annotations

import math

import pytest
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.metrics import MetricBag
from torch.nn.functional import cross_entropy

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.moxe import MoxEConfig, MoxELM, create_moxe_model
from moxe_plugin.train.metrics import add_loss_metrics, update_loss_metrics
from moxe_plugin.train.units import CausalLMEvalUnit, CausalLMTrainUnit
from tests.common import assert_close


@pytest.fixture
def model() -> MoxELM:
    config = MoxEConfig(
        vocab_size=320, model_dim=32, num_layers=2, num_heads=2, num_experts=4
    )

    return create_moxe_model(config)


def _make_batch(num_rows: int) -> SequenceBatch:
    seqs = torch.randint(2, 320, (num_rows, 8))

    target_mask = torch.zeros((num_rows, 8), dtype=torch.bool)
    target_mask[:, 5:] = True

    return SequenceBatch(seqs, None, target_mask=target_mask)


def _nll(model: MoxELM, batch: SequenceBatch) -> torch.Tensor:
    """Sum the cross-entropy over the last three tokens of each row."""
    inputs, _ = batch.as_auto_regressive()

    logits = model(*inputs.as_input())

    return cross_entropy(
        logits[:, 4:].flatten(0, 1), batch.seqs[:, 5:].flatten(), reduction="sum"
    )


def _compute(bag: MetricBag) -> dict[str, float]:
    return {name: float(metric.compute()) for name, metric in bag.metrics.items()}


def test_train_unit_returns_the_aggregate_of_all_terms(model: MoxELM) -> None:
    batch = _make_batch(3)

    unit = CausalLMTrainUnit(model, model)

    bag = MetricBag(torch.device("cpu"))
    unit.prepare_metric_bag(bag)

    loss, num_targets = unit.process_batch(batch, bag)

    metrics = _compute(bag)

    aux = sum(s * metrics[f"{n}_loss"] for n, s in model.aux_loss_scales.items())

    assert num_targets == 9
    assert aux > 0.0

    assert_close(loss, _nll(model, batch) + num_targets * aux)

    assert metrics["loss"] == pytest.approx(loss.item() / num_targets)
    assert metrics["nll_loss"] == pytest.approx(_nll(model, batch).item() / num_targets)


def test_train_unit_weighs_batches_by_their_size(model: MoxELM) -> None:
    unit = CausalLMTrainUnit(model, model)

    sums = {"loss": 0.0, "difficulty_loss": 0.0, "layer_1/mlstm_share": 0.0}

    all_bag = MetricBag(torch.device("cpu"))
    unit.prepare_metric_bag(all_bag)

    for num_rows in (1, 4):
        batch = _make_batch(num_rows)

        bag = MetricBag(torch.device("cpu"))
        unit.prepare_metric_bag(bag)

        unit.process_batch(batch, bag)
        unit.process_batch(batch, all_bag)

        for name in sums:
            sums[name] += num_rows * _compute(bag)[name]

    metrics = _compute(all_bag)

    for name, value in sums.items():
        assert metrics[name] == pytest.approx(value / 5), name


def test_statistic_that_is_zero_causes_no_warning(
    model: MoxELM, caplog: pytest.LogCaptureFixture
) -> None:
    bag = MetricBag(torch.device("cpu"))

    add_loss_metrics(bag, model)

    zero = torch.zeros(())
    stats = {name: zero for name in model.stat_names}
    losses = {name: zero for name in model.aux_loss_scales}

    update_loss_metrics(bag, LossTerms(zero + 1, zero + 1, losses, stats), 2, 2)

    assert _compute(bag)["layer_0/idle_experts"] == 0.0
    assert not caplog.records


def test_eval_unit_reports_pure_cross_entropy_per_token_and_byte(
    model: MoxELM,
) -> None:
    model.eval()

    batch = _make_batch(3)

    unit = CausalLMEvalUnit(model, model, num_bytes_per_token=4.0)

    bag = MetricBag(torch.device("cpu"))
    unit.prepare_metric_bag(bag)

    unit.process_batch(batch, bag)

    values: dict[str, object] = dict(_compute(bag))
    unit.process_metric_values(values)

    nll = _nll(model, batch).item() / 9

    assert "loss" not in values
    assert values["nll_loss"] == pytest.approx(nll)
    assert values["perplexity"] == pytest.approx(math.exp(nll))
    assert values["bits_per_byte"] == pytest.approx(nll / math.log(2) / 4.0)

    for name in (*model.stat_names, "difficulty_loss", "load_balance_loss"):
        assert name in values
