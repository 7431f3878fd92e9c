"""The state of recurrent blocks as fairseq2's generators want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fairseq2.nn import IncrementalState
from torch import Tensor
from typing_extensions import override

from moxe_plugin.nn.mlstm import MLSTMState
from moxe_plugin.nn.slstm import SLSTMState

BlockState = MLSTMState | SLSTMState


@final
class RecurrentState(IncrementalState):
    """Holds the states of a layer's blocks between steps of a generation.

    :param block_states: Of blocks that stand alone: the batch is dimension 0.
    :param expert_states: Of stacked experts ``(E,N,…)``: the batch is dimension 1.
        ``None`` stands for experts without memory.
    """

    def __init__(
        self,
        block_states: Sequence[BlockState],
        expert_states: Sequence[BlockState | None] = (),
    ) -> None:
        self.block_states = tuple(block_states)
        self.expert_states = tuple(expert_states)

    @override
    def reorder(self, new_order: Tensor) -> None:
        self.block_states = tuple(
            _select(state, 0, new_order) for state in self.block_states
        )
        self.expert_states = tuple(
            None if state is None else _select(state, 1, new_order)
            for state in self.expert_states
        )

    @override
    def size_bytes(self) -> int:
        states = (*self.block_states, *self.expert_states)

        return sum(t.nbytes for state in states if state is not None for t in state)

    @override
    def capacity_bytes(self) -> int:
        # A recurrent state never grows.
        return self.size_bytes()


def _select(state: BlockState, batch_dim: int, rows: Tensor) -> BlockState:
    return type(state)(*(t.index_select(batch_dim, rows) for t in state))
