"""The state of recurrent blocks as fairseq2's generators want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar, final

from fairseq2.nn import IncrementalState, IncrementalStateBag
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.expert_states import ExpertsState
from moxe_plugin.nn.mlstm_recurrence import MLSTMState
from moxe_plugin.nn.slstm_parameters import SLSTMState

BlockState: TypeAlias = MLSTMState | SLSTMState

BlockStateT = TypeVar("BlockStateT", bound=BlockState)


@final
class RecurrentState(IncrementalState):
    """Holds the states of a layer's blocks between steps of a generation.

    A step may write into the tensors that a bag holds; who wants to keep them makes
    copies, as :meth:`select` and :func:`fork_states` do.

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

    def map(self, function: Callable[[Tensor, int], Tensor]) -> RecurrentState:
        """Make a state of other tensors.

        :param function: Makes a tensor of one of this state's, given also which of its
            dimensions is the batch.

        :returns: The state.
        """

        def map_block(state: BlockStateT, batch_dim: int) -> BlockStateT:
            return type(state)(*(function(t, batch_dim) for t in state))

        block_states = [map_block(state, 0) for state in self.block_states]

        if self.experts_state is None:
            return RecurrentState(block_states)

        mlstm, slstm = self.experts_state

        experts_state = ExpertsState(
            None if mlstm is None else map_block(mlstm, 1),
            None if slstm is None else map_block(slstm, 1),
        )

        return RecurrentState(block_states, experts_state)

    def select(self, rows: Tensor) -> RecurrentState:
        """Copy the states of some sequences of the batch.

        :param rows: Which sequences; one may occur several times. *Shape:* ``(N)``.

        :returns: The copy, with a batch of ``N`` sequences.
        """
        return self.map(lambda t, batch_dim: t.index_select(batch_dim, rows))

    def tensors(self) -> list[Tensor]:
        """List the tensors, always in the same order.

        :returns: The tensors.
        """
        states = [*self.block_states, *(self.experts_state or ())]

        return [t for state in states for t in (state or ())]

    @override
    def reorder(self, new_order: Tensor) -> None:
        selected = self.select(new_order)

        self.block_states = selected.block_states
        self.experts_state = selected.experts_state

    @override
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @override
    def capacity_bytes(self) -> int:
        # A recurrent state never grows.
        return self.size_bytes()


def fork_states(
    model: Module, state_bag: IncrementalStateBag, rows: Tensor
) -> IncrementalStateBag:
    """Copy the states of some sequences, so that several texts can continue each.

    :param model: A model whose ``has_recurrent_state`` is true.
    :param state_bag: What the model left there; it stays as it is.
    :param rows: Which sequences; one may occur several times. *Shape:* ``(N)``.

    :returns: A bag for a batch of ``N`` sequences.
    """
    fork = IncrementalStateBag(state_bag.max_num_steps)

    for module in model.modules():
        state = state_bag.maybe_get_state(module, RecurrentState)
        if state is not None:
            fork.set_state(module, state.select(rows))

    return fork


def count_state_bytes(model: Module, state_bag: IncrementalStateBag) -> int:
    """Count the bytes of the recurrent states in a bag.

    :param model: The model whose states they are.
    :param state_bag: The bag.

    :returns: The sum over all modules and sequences.
    """
    states = (state_bag.maybe_get_state(m, RecurrentState) for m in model.modules())

    return sum(state.size_bytes() for state in states if state is not None)
