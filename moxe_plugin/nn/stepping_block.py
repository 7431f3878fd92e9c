"""What the two xLSTM blocks share: one token of each sequence, in Triton kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from moxe_plugin.nn.backend import (
    MAX_STEP_SEQS,
    ScanBackend,
    resolve_backend,
    runs_triton,
)
from moxe_plugin.nn.states import StateT, take_state

if TYPE_CHECKING:
    from moxe_plugin.nn.layers import CausalConv
    from moxe_plugin.nn.triton.step_units import StepUnits


def steps_in_triton(backend: ScanBackend, seqs: Tensor) -> bool:
    """Tell whether one token of each sequence may run through a block's Triton kernels.

    It may without gradients for up to ``MAX_STEP_SEQS`` sequences, with ``triton``, and
    with ``auto`` on any GPU of NVIDIA's: these kernels want little shared memory.

    :param backend: The choice.
    :param seqs: What a block reads. *Shape:* ``(N,S,M)``.

    :returns: Whether it may.

    :raises ValueError: As :func:`~moxe_plugin.nn.backend.resolve_backend`.
    :raises TritonMissingError: As there.
    """
    if (
        seqs.size(-2) != 1
        or seqs.size(0) > MAX_STEP_SEQS
        or torch.is_grad_enabled()
        or type(seqs) not in (Tensor, Parameter)
        or torch.compiler.is_compiling()
    ):
        return False

    if backend == "auto":
        return runs_triton(seqs)

    return resolve_backend(backend, seqs) == "triton"


class SteppingBlock(Module, ABC, Generic[StateT]):
    """A block, or a stack of E, that has kernels for a step of a generation."""

    num_experts: int | None
    backend: ScanBackend
    conv: CausalConv

    @abstractmethod
    def initial_state(
        self, batch_size: int, device: torch.device | None = None
    ) -> StateT:
        """Create the state before the first position.

        :param batch_size: The number of rows N.
        :param device: Where the state lives; the block's device by default.

        :returns: An empty memory.
        """

    @abstractmethod
    def step_units(self, units: StepUnits, state: StateT, out: Tensor) -> None:
        """Apply the block, or the experts that tokens chose, in Triton kernels.

        :param units: One token of each sequence, and who reads it.
        :param state: Its tensors are contiguous, and become the state after the token.
        :param out: Gets the outputs. *Shape:* ``(U,M)``.
        """

    def steps_units(self, seqs: Tensor) -> bool:
        """Tell whether :meth:`step_units` can be asked for.

        :param seqs: What the block, or what gives it units, reads. *Shape:*
            ``(N,S,M)``.

        :returns: See :func:`steps_in_triton`.
        """
        return self.conv.kernel_size > 1 and steps_in_triton(self.backend, seqs)

    def _is_step(self, seqs: Tensor, seq_lens: Tensor | None) -> bool:
        # Of a stack, those that have experts say which of them tokens chose.
        return self.num_experts is None and seq_lens is None and self.steps_units(seqs)

    def _step(
        self, seqs: Tensor, state: StateT | None, *, reuse: bool, returns_state: bool
    ) -> tuple[Tensor, StateT | None]:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.step_units import StepUnits

        if state is None:
            state = self.initial_state(seqs.size(0), seqs.device)
        else:
            state = take_state(state, reuse=reuse)

        # (N,1,M) -> (N,M)
        tokens = seqs.squeeze(1).contiguous()
        out = torch.empty_like(tokens)
        self.step_units(StepUnits(tokens), state, out)

        return out.view_as(seqs), state if returns_state else None
