"""Steps of a generation that are launched as a whole, from a CUDA graph.

A step is hundreds of small kernels, which a GPU computes faster than Python launches
them one by one. That takes a model whose state has a constant size, and which computes
a step without asking the GPU for anything.
"""

from __future__ import annotations

from typing import Any, final

import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import Module, Parameter
from typing_extensions import override

from moxe_plugin.models.captured_step import (
    Capture,
    CapturedStep,
    autocast_dtype,
    capture_cuda_graph,
)
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.recurrent_state import RecurrentState
from moxe_plugin.models.step_memory import StepMemory
from moxe_plugin.nn.backend import MAX_STEP_SEQS
from moxe_plugin.nn.experts import SparseExperts


def capture_steps(model: CausalLM) -> CausalLM:
    """Make a model launch the steps of a generation as a whole, where it can.

    :param model: The model.

    :returns: A :class:`CapturedStepsLM` if the model is recurrent, on a GPU, not
        sharded, and its experts' steps ask nothing of the GPU; else ``model`` itself.
    """
    if not isinstance(model, AuxLossCausalLM) or not model.has_recurrent_state:
        return model

    if not all(_is_plain(p) for p in model.parameters()):
        return model

    experts = [m for m in model.modules() if isinstance(m, SparseExperts)]
    if not all(m.steps_on_device for m in experts):
        return model

    return CapturedStepsLM(model)


def _is_plain(parameter: Parameter) -> bool:
    return parameter.is_cuda and type(parameter) is Parameter


@final
class CapturedStepsLM(CausalLM):
    """A recurrent model, the steps of whose generations are captured once.

    A call with one token of each of up to ``MAX_STEP_SEQS`` sequences, a state bag that
    has states, in evaluation mode and without gradients is a step; any other call is
    the model's own. A step is captured for a number of sequences that is a power of
    two, at the first one with more than half as many; all share the memory of their
    states. What the model's modules, or their fields, become later does not count; but
    parameters that move are noticed.

    The states in the bag of the last step are in that memory. They may be replaced,
    copied or reordered by others, and are copied out before another bag's get there;
    but who keeps their *tensors* finds them changed by the next step.

    :param model: The model; its ``has_recurrent_state`` is true.
    :param capture: Captures a step.
    """

    def __init__(
        self, model: AuxLossCausalLM, capture: Capture = capture_cuda_graph
    ) -> None:
        super().__init__(model.max_seq_len)

        self.model = model
        self._capture = capture
        self._memory: StepMemory | None = None
        self._steps: dict[object, CapturedStep] = {}
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
            and 0 < seqs.size(0) <= MAX_STEP_SEQS
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
        capacity = 1 << (seqs.size(0) - 1).bit_length()
        device = seqs.device

        # Parameters that moved would not be those in the graphs.
        addresses = [p.data_ptr() for p in self.model.parameters()]

        if (
            self._memory is None
            or addresses != self._addresses
            or not self._memory.fits(state_bag, capacity)
        ):
            self._steps, self._addresses = {}, addresses
            self._memory = StepMemory(self._stateful, state_bag, capacity)

        key = capacity, autocast_dtype(device.type)

        step = self._steps.get(key)
        if step is None:
            # What another bag has there would not outlive it.
            self._memory.release()
            step = CapturedStep(self.model, self._memory, capacity, device)
            step.capture(self._capture)
            self._steps[key] = step

        return step.run(seqs, state_bag)
