"""One step of a generation, captured; see :mod:`moxe_plugin.models.captured_steps`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias
from weakref import ReferenceType, ref

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import Module

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.recurrent_state import RecurrentState

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], object]]
"""Makes of a function one that does the same again, on the same tensors."""

_WARM_UP: Final = 2
"""Runs before a graph is captured: in them kernels are compiled and libraries make
their workspaces, which a graph must not hold."""


def capture_cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Capture a function in a CUDA graph.

    :param run: Computes on a GPU, always in the same tensors. It is run a few times.

    :returns: Launches the graph.
    """
    with torch.cuda.stream(stream := torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.default_stream())
        for _ in range(_WARM_UP):
            run()

    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    return graph.replay


class CapturedStep:
    """A step of a model for up to so many sequences, and the states that it changes.

    :param model: The model, in evaluation mode.
    :param state_bag: Has states like those that it is for.
    :param modules: Whose states they are.
    :param capacity: The most sequences.
    :param seqs: Tokens like those that it is for. *Shape:* ``(N,1)``.
    """

    def __init__(
        self,
        model: AuxLossCausalLM,
        state_bag: IncrementalStateBag,
        modules: Sequence[Module],
        capacity: int,
        seqs: Tensor,
    ) -> None:
        self._model = model
        self._logits: Tensor | None = None
        self._replay: Callable[[], object] | None = None

        # What the graph computes in. A generation is likely to be in inference mode,
        # and what is made there could not be written outside of it.
        with torch.inference_mode(mode=False):
            self._seqs = seqs.new_zeros(capacity, 1)
            self._layout = BatchLayout.of(self._seqs)

            def allocate(x: Tensor, batch_dim: int) -> Tensor:
                shape = list(x.shape)
                shape[batch_dim] = capacity

                return x.new_zeros(shape)

            self._states = {
                module: _state_of(module, state_bag).map(allocate) for module in modules
            }

        self._own_bag = IncrementalStateBag(2)

        # Whose states these are, and what it was handed.
        self._owner: ReferenceType[IncrementalStateBag] | None = None
        self._views: dict[Module, RecurrentState] = {}
        self._handed_out: list[Tensor] = []

    def capture(self, capture: Capture) -> None:
        """Capture the step; nothing of what it computes counts.

        :param capture: Captures it.
        """
        self._replay = capture(self._compute)

    def run(self, seqs: Tensor, state_bag: IncrementalStateBag) -> Tensor:
        """Read one token of each sequence.

        :param seqs: The tokens. *Shape:* ``(N,1)``.
        :param state_bag: Has the states, and gets those after the tokens.

        :returns: The logits. *Shape:* ``(N,1,V)``.
        """
        assert self._replay is not None

        if not self._holds_states_of(state_bag):
            self._take_over(state_bag, seqs.size(0))

        self._seqs[: seqs.size(0)] = seqs

        self._replay()

        assert self._logits is not None

        return self._logits[: seqs.size(0)].clone()

    def _compute(self) -> None:
        for module, state in self._states.items():
            self._own_bag.set_state(module, state.map(lambda x, _: x))

        with _autocast_without_cache(self._seqs.device.type):
            logits = self._model(self._seqs, self._layout, state_bag=self._own_bag)

        for module, state in self._states.items():
            after = _state_of(module, self._own_bag)
            for x, y in zip(state.tensors(), after.tensors(), strict=True):
                if x is not y:
                    x.copy_(y)

        self._logits = logits

    def _holds_states_of(self, state_bag: IncrementalStateBag) -> bool:
        if self._owner is None or self._owner() is not state_bag:
            return False

        return all(
            x is y
            for x, y in zip(
                self._list_tensors(state_bag), self._handed_out, strict=True
            )
        )

    def _take_over(self, state_bag: IncrementalStateBag, num_seqs: int) -> None:
        owner = None if self._owner is None else self._owner()

        if (
            owner is not None
            and owner is not state_bag
            and self._holds_states_of(owner)
        ):
            for module in self._states:
                copy = _state_of(module, owner).map(lambda x, _: x.clone())
                owner.set_state(module, copy)

        self._handed_out = []
        for module, state in self._states.items():
            view = state.map(lambda x, batch_dim: x.narrow(batch_dim, 0, num_seqs))

            given = _state_of(module, state_bag)
            for x, y in zip(view.tensors(), given.tensors(), strict=True):
                x.copy_(y)

            state_bag.set_state(module, view)
            self._handed_out += view.tensors()

        self._owner = ref(state_bag)

    def _list_tensors(self, state_bag: IncrementalStateBag) -> list[Tensor]:
        return [
            x for module in self._states for x in _state_of(module, state_bag).tensors()
        ]


def _state_of(module: Module, state_bag: IncrementalStateBag) -> RecurrentState:
    state = state_bag.maybe_get_state(module, RecurrentState)
    assert state is not None

    return state


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Tell what autocast computes in.

    :param device_type: Where.

    :returns: The type; ``None`` without autocast.
    """
    if not torch.is_autocast_enabled(device_type):
        return None

    return torch.get_autocast_dtype(device_type)


def _autocast_without_cache(device_type: str) -> AbstractContextManager[object]:
    # Copies of parameters that autocast keeps would not be in the graph.
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return nullcontext()

    return torch.autocast(device_type, dtype, cache_enabled=False)
