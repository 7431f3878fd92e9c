"""The state of recurrent blocks as fairseq2's generators want it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar, final

from fairseq2.nn import IncrementalState
from torch import Tensor
from typing_extensions import override

from moxe_plugin.nn.experts import ExpertsState
from moxe_plugin.nn.mlstm import MLSTMState
from moxe_plugin.nn.slstm import SLSTMState

BlockState: TypeAlias = MLSTMState | SLSTMState

BlockStateT = TypeVar("BlockStateT", bound=BlockState)


@final
class RecurrentState(IncrementalState):
    """Holds the states of a layer's blocks between steps of a generation.

    :param block_states: Of blocks that stand alone: the batch is dimension 0.
    :param experts_state: Of stacked experts ``(E,N,…)``: the batch is dimension 1.
        ``None`` if there are no experts, or none with memory.
    """

    def __init__(
        self,
        block_states: Sequence[BlockState],
        experts_state: ExpertsState | None = None,
    ) -> None:
        self.block_states = tuple(block_states)
        self.experts_state = experts_state

    @override
    def reorder(self, new_order: Tensor) -> None:
        self.block_states = tuple(
            _select(state, 0, new_order) for state in self.block_states
        )

        if self.experts_state is not None:
            mlstm, slstm = self.experts_state

            self.experts_state = ExpertsState(
                None if mlstm is None else _select(mlstm, 1, new_order),
                None if slstm is None else _select(slstm, 1, new_order),
            )

    @override
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for state in self._states() for tensor in state)

    @override
    def capacity_bytes(self) -> int:
        # A recurrent state never grows.
        return self.size_bytes()

    def _states(self) -> Iterator[BlockState]:
        yield from self.block_states

        for state in self.experts_state or ():
            if state is not None:
                yield state


def _select(state: BlockStateT, batch_dim: int, rows: Tensor) -> BlockStateT:
    return type(state)(*(t.index_select(batch_dim, rows) for t in state))
