"""The memory that captured steps compute in: see :mod:`.captured_steps`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias
from weakref import ReferenceType, ref

import torch
from fairseq2.nn import IncrementalStateBag
from torch import Tensor
from torch.nn import Module

from moxe_plugin.models.recurrent_state import RecurrentState

StateViews: TypeAlias = Mapping[Module, RecurrentState]
"""The states of modules, in the memory."""


class StepMemory:
    """Has the states of the texts of one bag at a time.

    Steps of any number of sequences share it: each sees its states in the first part of
    the same tensors.

    :param modules: Whose states they are.
    :param state_bag: Has states like those that it is for.
    :param capacity: The most sequences.
    """

    def __init__(
        self, modules: Sequence[Module], state_bag: IncrementalStateBag, capacity: int
    ) -> None:
        self.capacity = capacity

        given = {module: state_of(module, state_bag) for module in modules}

        # A generation is likely to be in inference mode, and what is made there could
        # not be written outside of it.
        with torch.inference_mode(mode=False):
            self._flat = {
                module: state.map(lambda x, dim: x.new_zeros(_count(x, dim, capacity)))
                for module, state in given.items()
            }

        # Of the others, sizes are all that is wanted.
        self._like = {
            module: state.map(lambda x, _: x.to("meta"))
            for module, state in given.items()
        }

        self._storages = {
            x.untyped_storage().data_ptr()
            for state in self._flat.values()
            for x in state.tensors()
        }
        self._owner: ReferenceType[IncrementalStateBag] | None = None
        self._handed_out: list[Tensor] = []

    def fits(self, state_bag: IncrementalStateBag, num_seqs: int) -> bool:
        """Tell whether a bag's states can be here.

        :param state_bag: The bag.
        :param num_seqs: The number of its sequences.

        :returns: Whether there is room, and types are the same.
        """
        return num_seqs <= self.capacity and all(
            x.dtype == y.dtype
            for module, state in self._flat.items()
            for x, y in zip(
                state.tensors(), state_of(module, state_bag).tensors(), strict=True
            )
        )

    def view(self, capacity: int) -> StateViews:
        """Show the states of a number of sequences.

        :param capacity: The number, not above that of the memory.

        :returns: The states; contiguous.
        """
        views = {}
        for module, like in self._like.items():
            flat = iter(self._flat[module].tensors())

            def show(x: Tensor, dim: int, flat: Iterator[Tensor] = flat) -> Tensor:
                shape = list(x.shape)
                shape[dim] = capacity

                return next(flat)[: _count(x, dim, capacity)].view(shape)

            views[module] = like.map(show)

        return views

    def hold(
        self, state_bag: IncrementalStateBag, views: StateViews, num_seqs: int
    ) -> None:
        """Make a bag's states those of the memory, unless they are.

        Another bag whose states are here gets copies of them.

        :param state_bag: The bag.
        :param views: What :meth:`view` returned.
        :param num_seqs: The number of sequences.

        :raises ValueError: The bag has states of another number of sequences.
        """
        owner = None if self._owner is None else self._owner()

        if owner is state_bag and self._is_handed_out(state_bag, num_seqs):
            return

        self.release()
        self._take_out(state_bag)

        self._handed_out = []
        for module, state in views.items():
            part = state.map(lambda x, dim: x.narrow(dim, 0, num_seqs))

            for x, y in zip(
                part.tensors(), state_of(module, state_bag).tensors(), strict=True
            ):
                if x.shape != y.shape:
                    raise ValueError(
                        f"`seqs` must have as many sequences as `state_bag`, but has "
                        f"{num_seqs}: a state is of shape {tuple(y.shape)} instead of "
                        f"{tuple(x.shape)}."
                    )
                x.copy_(y)

            state_bag.set_state(module, part)
            self._handed_out += part.tensors()

        self._owner = ref(state_bag)

    def release(self) -> None:
        """Copy out what is here, before something else is computed in the memory."""
        owner = None if self._owner is None else self._owner()

        if owner is not None:
            self._take_out(owner)

        self._owner = None

    def _is_handed_out(self, state_bag: IncrementalStateBag, num_seqs: int) -> bool:
        tensors = [
            x for module in self._flat for x in state_of(module, state_bag).tensors()
        ]

        # The first one is of a block that stands alone: the batch comes first.
        return tensors[0].size(0) == num_seqs and all(
            x is y for x, y in zip(tensors, self._handed_out, strict=True)
        )

    def _take_out(self, state_bag: IncrementalStateBag) -> None:
        # Others may have changed some of the states, and not others.
        for module in self._flat:
            state = state_bag.maybe_get_state(module, RecurrentState)

            if state is not None and any(map(self._is_here, state.tensors())):
                state_bag.set_state(
                    module, state.map(lambda x, _: x.clone() if self._is_here(x) else x)
                )

    def _is_here(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._storages


def state_of(module: Module, state_bag: IncrementalStateBag) -> RecurrentState:
    """Return a module's state.

    :param module: The module.
    :param state_bag: Has a state of it.

    :returns: The state.
    """
    state = state_bag.maybe_get_state(module, RecurrentState)
    assert state is not None

    return state


def _count(x: Tensor, batch_dim: int, num_seqs: int) -> int:
    return x.numel() // x.size(batch_dim) * num_seqs
