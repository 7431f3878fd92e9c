"""The parameters of the sLSTM block, and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import init
from typing_extensions import override

from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.block_weights import SLSTMWeights
from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.layers import (
    NORM_EPS,
    CausalConv,
    ScaleNorm,
    down_init_std,
    round_up_to_64,
    small_init_std,
)
from moxe_plugin.nn.padding import EMPTY, widen
from moxe_plugin.nn.stacked import expert_parameter
from moxe_plugin.nn.stepping_block import SteppingBlock

if TYPE_CHECKING:
    from moxe_plugin.nn.triton.step_units import StepUnits


class SLSTMState(NamedTuple):
    """What an sLSTM block remembers of a sequence."""

    conv: Tensor
    """The last inputs of the causal convolution. *Shape:* ``([E,]N,K-1,M)``."""

    c: Tensor
    """See :class:`~moxe_plugin.nn.slstm_cell.SLSTMMemory`; float32 or float64.
    *Shape:* ``([E,]N,H,D)``."""

    log_n: Tensor
    """See :class:`~moxe_plugin.nn.slstm_cell.SLSTMMemory`. *Shape:* ``([E,]N,H,D)``."""

    y: Tensor
    """See :class:`~moxe_plugin.nn.slstm_cell.SLSTMMemory`. *Shape:* ``([E,]N,H,D)``."""


class SLSTMParameters(SteppingBlock[SLSTMState]):
    """What :class:`~moxe_plugin.nn.slstm.SLSTMBlock` computes with.

    The authors' code leaves the gate projections and biases at 0 by a bug; we use the
    values it intends: gate projections ``N(0, 2/(5D))``, recurrent matrix 0, biases 0
    but for the forget gate's, ``5 - 12 (j/(D-1))^(0.3 + 1.3 r)`` for channel j of a
    head, r from 0 at the first to 1 at the last block.

    :param model_dim: The width M of input and output.
    :param num_heads: The number of heads H of the cell.
    :param conv_kernel_size: The number of taps K of the convolution.
    :param ffn_proj_factor: The hidden width of the feed-forward network over M, before
        rounding up to 64.
    :param num_experts: The number of stacked blocks; ``None`` for a single one.
    :param block_idx: Where the block stands among ``num_blocks``, for the forget bias.
    :param num_blocks: The number of blocks in the model.
    :param backend: What computes the loop over time and the convolution, and where
        :meth:`steps_units` says so the whole block: see :mod:`moxe_plugin.nn.backend`.

    :raises ValueError: ``model_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        conv_kernel_size: int = 4,
        ffn_proj_factor: float = 1.7,
        num_experts: int | None = None,
        block_idx: int = 0,
        num_blocks: int = 1,
        backend: ScanBackend = "auto",
    ) -> None:
        super().__init__()

        if model_dim % num_heads:
            raise ValueError(
                f"`num_heads` must divide `model_dim` ({model_dim}), but is "
                f"{num_heads} instead."
            )

        head_dim = model_dim // num_heads

        self.model_dim = model_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.block_idx = block_idx
        self.num_blocks = num_blocks
        self.backend = backend

        self.norm = ScaleNorm(model_dim, num_experts=num_experts)
        self.conv = CausalConv(
            model_dim,
            kernel_size=conv_kernel_size,
            activates=True,
            num_experts=num_experts,
        )
        # ([E,]H,in,gate,out), gates i, f, z, o
        self.gate_proj = expert_parameter(num_experts, num_heads, head_dim, 4, head_dim)
        self.recurrent_weight = expert_parameter(
            num_experts, num_heads, head_dim, 4, head_dim
        )
        self.gate_bias = expert_parameter(num_experts, num_heads, 4, head_dim)
        self.out_norm = ScaleNorm(
            model_dim, num_heads=num_heads, num_experts=num_experts
        )
        self.ffn_norm = ScaleNorm(model_dim, num_experts=num_experts)
        self.ffn = GatedFeedForward(
            model_dim,
            round_up_to_64(ffn_proj_factor * model_dim),
            up_std=small_init_std(model_dim),
            down_std=down_init_std(model_dim, num_blocks),
            num_experts=num_experts,
        )

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the block's own parameters; norms, conv and FFN do theirs."""
        init.normal_(self.gate_proj, std=small_init_std(self.head_dim))
        init.zeros_(self.recurrent_weight)
        init.zeros_(self.gate_bias)

        depth = self.block_idx / (self.num_blocks - 1) if self.num_blocks > 1 else 0.0
        channel = torch.linspace(0.0, 1.0, self.head_dim, device=self.gate_bias.device)
        with torch.no_grad():
            self.gate_bias[..., 1, :] = 5 - 12 * channel ** (0.3 + 1.3 * depth)

    @override
    def initial_state(
        self, batch_size: int, device: torch.device | None = None
    ) -> SLSTMState:
        weight = self.gate_proj
        rows = (*weight.shape[:-4], batch_size)
        heads = (*rows, self.num_heads, self.head_dim)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(
                shape, device=device or weight.device, dtype=widen(weight[:0]).dtype
            )

        return SLSTMState(
            zeros(*rows, self.conv.kernel_size - 1, self.model_dim),
            zeros(*heads),
            zeros(*heads) + EMPTY,
            zeros(*heads),
        )

    @override
    def step_units(self, units: StepUnits, state: SLSTMState, out: Tensor) -> None:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.block_steps import step_slstm_block

        weights = self._list_weights()

        step_slstm_block(units, weights, state, out, NORM_EPS)

    def _list_weights(self) -> SLSTMWeights:
        return SLSTMWeights(
            *(self.norm.weight, self.conv.weight, self.conv.bias),
            *(self.gate_proj, self.recurrent_weight, self.gate_bias),
            *(self.out_norm.weight, self.ffn_norm.weight),
            *(self.ffn.up_proj, self.ffn.down_proj),
        )
