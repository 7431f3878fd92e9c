"""The parameters of the mLSTM block, and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import init
from typing_extensions import override

from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.block_weights import MLSTMWeights
from moxe_plugin.nn.layers import (
    NORM_EPS,
    CausalConv,
    ScaleNorm,
    down_init_std,
    round_up_to_64,
    small_init_std,
)
from moxe_plugin.nn.mlstm_recurrence import MLSTMState
from moxe_plugin.nn.padding import EMPTY, widen
from moxe_plugin.nn.stacked import expert_parameter
from moxe_plugin.nn.stepping_block import SteppingBlock

if TYPE_CHECKING:
    from moxe_plugin.nn.triton.step_units import StepUnits


class MLSTMParameters(SteppingBlock[MLSTMState]):
    """What :class:`~moxe_plugin.nn.mlstm.MLSTMBlock` computes with.

    The authors' code leaves q, k, v at 0, from where they never move; we use the values
    it intends: q, k, v ``N(0, 2/(5*qkv_block_size))``, ``W_up`` ``N(0, 2/(5M))``,
    ``W_down`` ``N(0, (2/(num_blocks*sqrt(M)))²)``, ``W_i`` and ``W_f`` 0, ``b_i``
    ``N(0, 0.01)``, ``b_f`` evenly from 3 to 6 over the heads, skip 1.

    :param model_dim: The width M of input and output.
    :param num_heads: The number of heads H of the cell.
    :param conv_kernel_size: The number of taps K of the convolution.
    :param qkv_block_size: The number of channels that q, k and v mix at a time.
    :param proj_factor: The inner width I over M, before rounding up to 64.
    :param num_experts: The number of stacked blocks; ``None`` for a single one.
    :param num_blocks: The number of blocks in the model, for the initial ``W_down``.
    :param backend: ``triton``, and ``auto`` on a GPU, run the whole block in Triton
        where ``trains_on_rows`` or :meth:`steps_units` say so; ``native`` and ``auto``
        use C++ on CPUs; all else is torch's. See :mod:`moxe_plugin.nn.backend`.

    :raises ValueError: The inner width is not a multiple of ``num_heads`` or of
        ``qkv_block_size``.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        conv_kernel_size: int = 4,
        qkv_block_size: int = 32,
        proj_factor: float = 2.0,
        num_experts: int | None = None,
        num_blocks: int = 1,
        backend: ScanBackend = "auto",
    ) -> None:
        super().__init__()

        inner_dim = round_up_to_64(proj_factor * model_dim)

        if inner_dim % num_heads:
            raise ValueError(
                f"`num_heads` must divide the inner width ({inner_dim}), but is "
                f"{num_heads} instead."
            )

        if inner_dim % qkv_block_size:
            raise ValueError(
                f"`qkv_block_size` must divide the inner width ({inner_dim}), but is "
                f"{qkv_block_size} instead."
            )

        self.model_dim = model_dim
        self.inner_dim = inner_dim
        self.num_heads = num_heads
        self.num_experts = num_experts
        self.num_blocks = num_blocks
        self.backend = backend

        qkv_shape = (inner_dim // qkv_block_size, qkv_block_size, qkv_block_size)

        self.norm = ScaleNorm(model_dim, num_experts=num_experts)
        self.up_proj = expert_parameter(num_experts, model_dim, 2 * inner_dim)
        self.conv = CausalConv(
            inner_dim,
            kernel_size=conv_kernel_size,
            activates=True,
            num_experts=num_experts,
        )
        self.q_proj = expert_parameter(num_experts, *qkv_shape)
        self.k_proj = expert_parameter(num_experts, *qkv_shape)
        self.v_proj = expert_parameter(num_experts, *qkv_shape)
        self.input_gate_weight = expert_parameter(num_experts, 3 * inner_dim, num_heads)
        self.input_gate_bias = expert_parameter(num_experts, num_heads)
        self.forget_gate_weight = expert_parameter(
            num_experts, 3 * inner_dim, num_heads
        )
        self.forget_gate_bias = expert_parameter(num_experts, num_heads)
        self.out_norm = ScaleNorm(
            inner_dim, num_heads=num_heads, num_experts=num_experts
        )
        self.skip = expert_parameter(num_experts, inner_dim)
        self.down_proj = expert_parameter(num_experts, inner_dim, model_dim)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the block's own parameters; norms and convolution do theirs."""
        init.normal_(self.up_proj, std=small_init_std(self.model_dim))
        for weight in (self.q_proj, self.k_proj, self.v_proj):
            init.normal_(weight, std=small_init_std(weight.size(-2)))
        init.zeros_(self.input_gate_weight)
        init.normal_(self.input_gate_bias, std=0.1)
        init.zeros_(self.forget_gate_weight)
        with torch.no_grad():
            self.forget_gate_bias.copy_(
                torch.linspace(3.0, 6.0, self.num_heads, device=self.skip.device)
            )
        init.ones_(self.skip)
        init.normal_(self.down_proj, std=down_init_std(self.model_dim, self.num_blocks))

    @override
    def initial_state(
        self, batch_size: int, device: torch.device | None = None
    ) -> MLSTMState:
        weight = self.up_proj
        rows = (*weight.shape[:-2], batch_size)
        heads = (*rows, self.num_heads)
        head_dim = self.inner_dim // self.num_heads

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(
                shape, device=device or weight.device, dtype=widen(weight[:0]).dtype
            )

        return MLSTMState(
            zeros(*rows, self.conv.kernel_size - 1, self.inner_dim),
            zeros(*heads, head_dim, head_dim),
            zeros(*heads, head_dim),
            zeros(*heads) + EMPTY,
        )

    @override
    def step_units(self, units: StepUnits, state: MLSTMState, out: Tensor) -> None:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.block_steps import step_mlstm_block

        weights = self._list_weights()

        step_mlstm_block(units, weights, state, out, self.num_heads, NORM_EPS)

    def _list_weights(self) -> MLSTMWeights:
        return MLSTMWeights(
            *(self.norm.weight, self.up_proj, self.conv.weight, self.conv.bias),
            *(self.q_proj, self.k_proj, self.v_proj),
            *(self.input_gate_weight, self.forget_gate_weight),
            *(self.input_gate_bias, self.forget_gate_bias),
            *(self.out_norm.weight, self.skip, self.down_proj),
        )
