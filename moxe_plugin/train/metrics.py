"""The metrics of a causal language model with auxiliary losses."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Final, final

import torch
from fairseq2.metrics import Mean, MetricBag, format_as_float
from fairseq2.metrics.common import add_nll_loss_metric, update_nll_loss_metric
from fairseq2.metrics.recorders import MetricDescriptor
from fairseq2.runtime.dependency import DependencyContainer
from torch import Tensor
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM, LossTerms

_AUX_LOSSES: Final = ("difficulty", "group", "router_z", "load_balance", "dynamic")

_ROUTER_STATS: Final = (
    "mlstm_share",
    "slstm_share",
    "router_entropy",
    "difficulty",
    "busiest_expert_share",
    "idle_experts",
    "experts_per_token",
)

_MAX_DESCRIBED_LAYERS: Final = 64


def register_metric_descriptors(container: DependencyContainer) -> None:
    """Tell fairseq2 how to show the metrics of this module.

    fairseq2 wants a descriptor per name before there is a model to ask, hence the
    per-layer statistics are enumerated. They go to the metric files under their own
    names, but not to the log, where they would bury the losses.

    :param container: The container of the recipe.
    """
    descriptors = [
        MetricDescriptor("perplexity", "Perplexity", 101, format_as_float),
        MetricDescriptor("bits_per_byte", "Bits per Byte", 102, format_as_float),
    ]

    for name in _AUX_LOSSES:
        title = f"{name.replace('_', ' ').title()} Loss"

        descriptors.append(
            MetricDescriptor(aux_metric_name(name), title, 120, format_as_float)
        )

    for layer in range(_MAX_DESCRIBED_LAYERS):
        for stat in _ROUTER_STATS:
            name = f"layer_{layer}/{stat}"

            descriptors.append(
                MetricDescriptor(name, name, 400 + layer, format_as_float, log=False)
            )

    for descriptor in descriptors:
        container.collection.register_instance(MetricDescriptor, descriptor)


def aux_metric_name(aux_loss: str) -> str:
    """Return the metric name of an auxiliary loss.

    :param aux_loss: Its name in ``AuxLossCausalLM.aux_loss_scales``.

    :returns: The name under which the loss is recorded.
    """
    return f"{aux_loss}_loss"


@torch.inference_mode()
def add_loss_metrics(bag: MetricBag, model: AuxLossCausalLM) -> None:
    """Prepare a bag for :func:`update_loss_metrics`.

    :param bag: The bag of a train or evaluation unit.
    :param model: The model itself, not its data-parallel wrapper.
    """
    add_nll_loss_metric(bag)

    for name in model.aux_loss_scales:
        bag.add(aux_metric_name(name), _ZeroableMean())

    for name in model.stat_names:
        bag.add(name, _ZeroableMean())


@torch.inference_mode()
def update_loss_metrics(
    bag: MetricBag, terms: LossTerms, num_targets: int, num_tokens: int
) -> None:
    """Record the terms of a batch, all but the aggregate.

    :param bag: A bag prepared by :func:`add_loss_metrics`.
    :param terms: The terms, reduced to sums over the batch.
    :param num_targets: The number of targets in the batch; weighs the cross-entropy.
    :param num_tokens: The number of tokens in the batch; weighs everything else, which
        is a mean over tokens.
    """
    update_nll_loss_metric(bag, terms.nll, num_targets)

    for name, loss in terms.aux_losses.items():
        bag.get(aux_metric_name(name), Mean).update(loss.detach(), weight=num_tokens)

    for name, stat in terms.stats.items():
        bag.get(name, Mean).update(stat.detach(), weight=num_tokens)


@torch.inference_mode()
def add_aggregate_loss_metric(bag: MetricBag) -> None:
    """Prepare a bag for :func:`update_aggregate_loss_metric`.

    :param bag: The bag of a train unit.
    """
    bag.add("loss", Mean())


@torch.inference_mode()
def update_aggregate_loss_metric(
    bag: MetricBag, aggregate: Tensor, num_targets: int
) -> None:
    """Record what training minimises, in nats per target.

    :param bag: A bag prepared by :func:`add_aggregate_loss_metric`.
    :param aggregate: The loss summed over the batch.
    :param num_targets: The number of targets in the batch.
    """
    loss = aggregate.detach() / num_targets

    bag.get("loss", Mean).update(loss, weight=num_targets)


def add_perplexity(values: MutableMapping[str, object]) -> None:
    """Derive the perplexity per target, ``exp(nll_loss)``.

    :param values: The metric values, with ``nll_loss`` in nats per target.
    """
    values["perplexity"] = math.exp(min(_nll(values), _MAX_EXPONENT))


def add_bits_per_byte(
    values: MutableMapping[str, object], num_bytes_per_token: float
) -> None:
    """Derive the bits per byte of text, ``nll_loss / ln(2) / num_bytes_per_token``.

    :param values: The metric values, with ``nll_loss`` in nats per target.
    :param num_bytes_per_token: How many bytes of UTF-8 a target stands for on average.
    """
    values["bits_per_byte"] = _nll(values) / math.log(2) / num_bytes_per_token


@final
class _ZeroableMean(Mean):
    """A mean that may be zero: the base class takes that for a missing update."""

    weighted_sum: Tensor
    weights: Tensor

    @override
    def compute(self) -> Tensor:
        if self.weights == 0.0:
            return self.weighted_sum

        return self.weighted_sum / self.weights


_MAX_EXPONENT: Final = 700.0
"""``exp`` of more overflows a float."""


def _nll(values: MutableMapping[str, object]) -> float:
    nll = values["nll_loss"]

    assert isinstance(nll, Tensor | float)

    return float(nll)
