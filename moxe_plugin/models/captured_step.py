"""One step of a generation, captured; see :mod:`moxe_plugin.models.captured_steps`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.step_memory import StateViews, StepMemory, state_of

Replay: TypeAlias = Callable[[], object]
"""Does again what was captured, on the same tensors."""

Capture: TypeAlias = Callable[[Callable[[], object], torch.device], Replay]
"""Makes a replay of what a function computes on a device."""

_WARM_UP: Final = 2
"""Runs before a graph is captured: in them kernels are compiled and libraries make
their workspaces, which a graph must not hold."""


def capture_cuda_graph(run: Callable[[], object], device: torch.device) -> Replay:
    """Capture a function in a CUDA graph.

    :param run: Computes on a GPU, always in the same tensors. It is run a few times.
    :param device: The GPU.

    :returns: Launches the graph.
    """
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()

            with torch.cuda.graph(graph, stream=stream):
                run()

        torch.cuda.current_stream().wait_stream(stream)

    return graph.replay


class CapturedStep:
    """A step of a model for up to so many sequences.

    :param model: The model, in evaluation mode.
    :param memory: What it computes in.
    :param capacity: The most sequences.
    :param device: Where.
    """

    def __init__(
        self,
        model: AuxLossCausalLM,
        memory: StepMemory,
        capacity: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._memory = memory
        self._views: StateViews = memory.view(capacity)
        self._logits: Tensor | None = None
        self._replay: Replay | None = None

        with torch.inference_mode(mode=False):
            self._seqs = torch.zeros(capacity, 1, dtype=torch.int64, device=device)
            self._layout = BatchLayout.of(self._seqs)

    def capture(self, capture: Capture) -> None:
        """Capture the step; it changes what is in the memory.

        :param capture: Captures it.
        """
        self._replay = capture(self._compute, self._seqs.device)

    def run(self, seqs: Tensor, state_bag: IncrementalStateBag) -> Tensor:
        """Read one token of each sequence.

        :param seqs: The tokens. *Shape:* ``(N,1)``.
        :param state_bag: Has the states, and gets those after the tokens.

        :returns: The logits. *Shape:* ``(N,1,V)``.

        :raises ValueError: The bag has states of another number of sequences.
        """
        assert self._replay is not None

        self._memory.hold(state_bag, self._views, seqs.size(0))

        self._seqs[: seqs.size(0)] = seqs

        self._replay()

        assert self._logits is not None

        return self._logits[: seqs.size(0)].clone()

    def _compute(self) -> None:
        state_bag = IncrementalStateBag(2)
        for module, state in self._views.items():
            state_bag.set_state(module, state.map(lambda x, _: x))

        with _autocast_without_cache(self._seqs.device.type):
            logits = self._model(self._seqs, self._layout, state_bag=state_bag)

        for module, state in self._views.items():
            after = state_of(module, state_bag)
            for x, y in zip(state.tensors(), after.tensors(), strict=True):
                if x is not y:
                    x.copy_(y)

        self._logits = logits


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
