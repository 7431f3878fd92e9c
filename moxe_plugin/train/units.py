"""What happens to a batch in training and in validation."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple, final

from fairseq2.datasets import SequenceBatch
from fairseq2.gang import Gang, ReduceOperation
from fairseq2.metrics import MetricBag
from fairseq2.metrics.common import add_seq_batch_metrics, update_seq_batch_metrics
from fairseq2.recipe import EvalUnit, TrainUnit  # their modules cannot come first
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM, LossTerms
from moxe_plugin.train.continuing import CommitGate
from moxe_plugin.train.finite import FiniteWatch
from moxe_plugin.train.metrics import (
    add_aggregate_loss_metric,
    add_bits_per_byte,
    add_loss_metrics,
    add_perplexity,
    update_aggregate_loss_metric,
    update_loss_metrics,
)
from moxe_plugin.train.routing_recorder import LoadHistory


class _BatchLoss(NamedTuple):
    terms: LossTerms
    num_targets: int


@final
class CausalLMTrainUnit(TrainUnit[SequenceBatch]):
    """Computes the aggregate loss of a batch and records its terms.

    :param dp_model: The model in its data-parallel wrapper.
    :param model: The model itself, which names its losses and statistics.
    :param load_history: Gets the load of the experts, if it is to be recorded.
    :param finite_watch: Is shown the terms of each batch.
    :param commit_gate: Is opened when a step begins.
    """

    def __init__(
        self,
        dp_model: Module,
        model: AuxLossCausalLM,
        load_history: LoadHistory | None = None,
        *,
        finite_watch: FiniteWatch | None = None,
        commit_gate: CommitGate | None = None,
    ) -> None:
        self._dp_model = dp_model
        self._model = model
        self._load_history = load_history
        self._finite_watch = finite_watch
        self._commit_gate = commit_gate

        self._step_nr = 0
        self._expert_loads: Tensor | None = None

    @override
    def set_step_nr(self, step_nr: int) -> None:
        self._step_nr = step_nr

        # Those of a step that fp16 gave up, if any
        self._expert_loads = None

        if self._finite_watch is not None:
            self._finite_watch.begin_step(step_nr)

        if self._commit_gate is not None:
            self._commit_gate.open()

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        add_aggregate_loss_metric(metric_bag)
        add_loss_metrics(metric_bag, self._model)
        add_seq_batch_metrics(metric_bag)

    @override
    def process_batch(
        self, batch: SequenceBatch, metric_bag: MetricBag
    ) -> tuple[Tensor, int]:
        terms, num_targets = _compute_loss(self._dp_model, batch, metric_bag)

        update_aggregate_loss_metric(metric_bag, terms.aggregate, num_targets)

        if self._finite_watch is not None:
            self._finite_watch.observe(terms)

        if (loads := terms.expert_loads) is not None:
            if self._expert_loads is not None:
                loads = loads + self._expert_loads

            self._expert_loads = loads

        return terms.aggregate, num_targets

    def finish_step(self, gang: Gang) -> None:
        """Record the load of the experts in the step, and let the model follow it.

        It must be called after the optimizer's update: between a forward and its
        backward, activation checkpointing would compute something else.

        :param gang: The processes that share the step's batches.
        """
        loads, self._expert_loads = self._expert_loads, None

        if loads is None:
            return

        if self._load_history is not None:
            self._load_history.add(self._step_nr, loads, gang)

        if self._model.adjusts_to_loads:
            gang.all_reduce(loads, ReduceOperation.SUM)

            self._model.adjust_to_loads(loads)

    @override
    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        add_perplexity(values)


@final
class CausalLMEvalUnit(EvalUnit[SequenceBatch]):
    """Records the cross-entropy of a batch and the model's other terms.

    :param dp_model: The model in its data-parallel wrapper.
    :param model: The model itself, which names its losses and statistics.
    :param num_bytes_per_token: How many bytes of text a target stands for on average,
        if known; adds bits per byte to the metrics.
    :param commit_gate: Is closed when a validation begins.
    """

    def __init__(
        self,
        dp_model: Module,
        model: AuxLossCausalLM,
        num_bytes_per_token: float | None = None,
        commit_gate: CommitGate | None = None,
    ) -> None:
        self._dp_model = dp_model
        self._model = model
        self._num_bytes_per_token = num_bytes_per_token
        self._commit_gate = commit_gate

    @override
    def set_train_step_nr(self, step_nr: int) -> None:
        if self._commit_gate is not None:
            self._commit_gate.close()

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        add_loss_metrics(metric_bag, self._model)
        add_seq_batch_metrics(metric_bag)

    @override
    def process_batch(self, batch: SequenceBatch, metric_bag: MetricBag) -> None:
        _compute_loss(self._dp_model, batch, metric_bag)

    @override
    def process_metric_values(self, values: MutableMapping[str, object]) -> None:
        add_perplexity(values)

        if self._num_bytes_per_token is not None:
            add_bits_per_byte(values, self._num_bytes_per_token)


def _compute_loss(
    dp_model: Module, batch: SequenceBatch, metric_bag: MetricBag
) -> _BatchLoss:
    input_batch, target_batch = batch.as_auto_regressive()

    seqs, seqs_layout = input_batch.as_input()

    # Through the wrapper, or the gradients are not reduced across processes.
    terms: LossTerms = dp_model(
        seqs,
        seqs_layout,
        targets=target_batch.seqs,
        target_mask=target_batch.target_mask,
        reduction="sum",
        return_terms=True,
    )

    num_targets = target_batch.num_target_elements

    update_loss_metrics(metric_bag, terms, num_targets, input_batch.num_elements)

    update_seq_batch_metrics(metric_bag, target_batch)

    return _BatchLoss(terms, num_targets)
