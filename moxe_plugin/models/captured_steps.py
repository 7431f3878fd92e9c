"""Steps of a generation that are launched as a whole, from a CUDA graph.

A step is hundreds of small kernels, which a GPU computes faster than Python launches
them one by one. That takes a model whose state has a constant size, and which computes
a step without asking the GPU for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeAlias, final
from weakref import ReferenceType, ref

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import Module, Parameter
from typing_extensions import override

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.recurrent_state import RecurrentState
from moxe_plugin.nn.experts import SparseExperts

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], object]]
"""Makes of a function one that does the same again, on the same tensors."""

_WARM_UP: Final = 2
"""Runs before a graph is captured: in them kernels are compiled and libraries make
their workspaces, which a graph must not hold."""


def capture_steps(model: CausalLM) -> CausalLM:
    """Make a model launch the steps of a generation as a whole, where it can.

    :param model: The model.

    :returns: A :class:`CapturedStepsLM` if the model is recurrent, on a GPU, not
        sharded, and its experts' steps ask nothing of the GPU; else ``model`` itself.
    """
    if not isinstance(model, AuxLossCausalLM) or not model.has_recurrent_state:
        return model

    if any(not p.is_cuda or type(p) is not Parameter for p in model.parameters()):
        return model

    experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
    if not all(m.steps_on_device for m in experts):
        return model

    return CapturedStepsLM(model)


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


@final
class CapturedStepsLM(CausalLM):
    """A recurrent model, the steps of whose generations are captured once.

    A call with one token of each sequence, a state bag that has states, in evaluation
    mode and without gradients is a step; any other call is the model's own. A step is
    captured for a number of sequences that is a power of two, at the first one with
    more than half as many; each of these numbers has states of its own in memory.

    The tensors in the bag of the last step are those that the graph computes in. What
    others change there is respected, and they may be kept, copied or reordered; only
    those who keep the *tensors* find them changed by the next step.

    :param model: The model; its ``has_recurrent_state`` is true.
    :param capture: Captures a step.
    """

    def __init__(
        self, model: AuxLossCausalLM, capture: Capture = capture_cuda_graph
    ) -> None:
        super().__init__(model.max_seq_len)

        self.model = model
        self._capture = capture
        self._steps: dict[object, _CapturedStep] = {}
        self._addresses: list[int] = []
        self._stateful: list[Module] = []

    @override
    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        targets: Tensor | None = None,
        *,
        state_bag: IncrementalStateBag | None = None,
        **options: Any,
    ) -> Any:
        """Compute logits, or a loss when ``targets`` are given.

        :param seqs: See :meth:`AuxLossCausalLM.forward`, as for all parameters.
        :param seqs_layout: As there.
        :param targets: As there.
        :param state_bag: As there.
        :param options: As there.

        :returns: As there.

        :raises ValueError: As there.
        """
        if targets is not None or state_bag is None or options:
            return self.model(
                seqs, seqs_layout, targets, state_bag=state_bag, **options
            )

        if self._is_step(seqs, seqs_layout) and self._has_states(state_bag):
            return self._step(seqs, state_bag)

        return self.model(seqs, seqs_layout, state_bag=state_bag)

    def _is_step(self, seqs: Tensor, seqs_layout: BatchLayout) -> bool:
        return (
            seqs.ndim == 2
            and seqs.size(1) == 1
            and not (seqs_layout.packed or seqs_layout.padded)
            and not self.model.training
            and not torch.is_grad_enabled()
        )

    def _has_states(self, state_bag: IncrementalStateBag) -> bool:
        if not self._stateful:
            self._stateful = [
                module
                for module in self.model.modules()
                if state_bag.maybe_get_state(module, RecurrentState) is not None
            ]

        return bool(self._stateful) and all(
            state_bag.maybe_get_state(module, RecurrentState) is not None
            for module in self._stateful
        )

    def _step(self, seqs: Tensor, state_bag: IncrementalStateBag) -> Tensor:
        # Parameters that moved would not be those in the graphs.
        addresses = [p.data_ptr() for p in self.model.parameters()]
        if addresses != self._addresses:
            self._steps, self._addresses = {}, addresses

        capacity = 1 << (seqs.size(0) - 1).bit_length()
        key = capacity, _autocast_dtype(seqs.device.type)

        step = self._steps.get(key)
        if step is None:
            step = _CapturedStep(self.model, state_bag, self._stateful, capacity, seqs)
            step.capture(self._capture)
            self._steps[key] = step

        return step.run(seqs, state_bag)


class _CapturedStep:
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
        self._replay = capture(self._compute)

    def run(self, seqs: Tensor, state_bag: IncrementalStateBag) -> Tensor:
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


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device_type):
        return None

    return torch.get_autocast_dtype(device_type)


def _autocast_without_cache(device_type: str) -> AbstractContextManager[object]:
    # Copies of parameters that autocast keeps would not be in the graph.
    dtype = _autocast_dtype(device_type)
    if dtype is None:
        return nullcontext()

    return torch.autocast(device_type, dtype, cache_enabled=False)
