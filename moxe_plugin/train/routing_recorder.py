"""Shows TensorBoard how each layer spreads its tokens over its experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from fairseq2.error import raise_operational_system_error
from fairseq2.gang import Gang, ReduceOperation
from fairseq2.metrics.recorders import MetricRecorder
from fairseq2.recipe.config import CommonSection, RegimeSection
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override


@final
class LoadHistory:
    """Sums the load of experts until it is published.

    It is no metric of fairseq2's: those are scalars, and one more would keep earlier
    runs from being continued.

    :param every_n_steps: The number of steps of a sum; ``None`` keeps nothing.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self._every_n_steps = every_n_steps

        self._local_loads: Tensor | None = None
        self._loads: Tensor | None = None

    def add(self, step_nr: int, loads: Tensor, gang: Gang) -> None:
        """Add the loads of a step; all processes must do so.

        :param step_nr: The number of the step.
        :param loads: How many tokens each expert got in this process. *Shape:*
            ``(L,E)``.
        :param gang: The processes; they communicate once per sum, not per step.
        """
        if self._every_n_steps is None:
            return

        if self._local_loads is not None:
            loads = loads + self._local_loads

        self._local_loads = loads

        if step_nr % self._every_n_steps == 0:
            self._local_loads = None
            self._loads = loads.clone()

            gang.all_reduce(self._loads, ReduceOperation.SUM)

    def take(self) -> Tensor | None:
        """Hand out the last sum, once.

        :returns: The loads in all processes; ``None`` if there are none. *Shape:*
            ``(L,E)``.
        """
        loads, self._loads = self._loads, None

        return loads


@final
class RoutingRecorder(MetricRecorder):
    """Writes a histogram per layer: the share of assignments that each expert got.

    The bucket of expert ``i`` is ``[i - 0.5, i + 0.5]``. The events have a directory of
    their own, since TensorBoard reads only the newest file of a directory.

    :param directory: Where the events go.
    :param history: The loads.
    """

    def __init__(self, directory: Path, history: LoadHistory) -> None:
        self._directory = directory
        self._history = history
        self._writer: SummaryWriter | None = None

    @override
    def record_metric_values(
        self, category: str, values: Mapping[str, object], step_nr: int | None = None
    ) -> None:
        if category != "train":
            return

        loads = self._history.take()
        if loads is None:
            return

        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._directory)

            for idx, shares in enumerate(_to_shares(loads)):
                _write_histogram(self._writer, f"layer_{idx}/experts", shares, step_nr)

            self._writer.flush()
        except OSError as ex:
            raise_operational_system_error(ex)

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _to_shares(loads: Tensor) -> list[list[float]]:
    loads = loads.cpu().double()

    # A layer without a token has no share.
    shares: list[list[float]] = (loads / loads.sum(1, keepdim=True).clamp(1)).tolist()

    return shares


def _write_histogram(
    writer: SummaryWriter, name: str, shares: list[float], step_nr: int | None
) -> None:
    num_experts = len(shares)

    writer.add_histogram_raw(
        name,
        min=-0.5,
        max=num_experts - 0.5,
        num=1,
        sum=sum(idx * share for idx, share in enumerate(shares)),
        sum_squares=sum(idx**2 * share for idx, share in enumerate(shares)),
        bucket_limits=[idx + 0.5 for idx in range(num_experts)],
        bucket_counts=shares,
        global_step=step_nr,
    )


def register_routing_recorder(container: DependencyContainer) -> None:
    """Record routing wherever TensorBoard is on, in ``OUTPUT_DIR/tb/routing``.

    fairseq2 creates recorders in the first process only.

    :param container: The container of a training recipe.
    """

    def create_history(resolver: DependencyResolver) -> LoadHistory:
        recorders = resolver.resolve(CommonSection).metric_recorders

        if not recorders.tensorboard.enabled:
            return LoadHistory(None)

        regime = resolver.resolve(RegimeSection)

        return LoadHistory(regime.publish_metrics_every_n_steps)

    def create_recorder(resolver: DependencyResolver) -> MetricRecorder:
        directory = resolver.resolve(Path) / "tb" / "routing"

        return RoutingRecorder(directory, resolver.resolve(LoadHistory))

    container.register(LoadHistory, create_history, singleton=True)

    container.collection.register(MetricRecorder, create_recorder)
