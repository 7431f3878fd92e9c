"""Whole blocks for one token of each sequence, in Triton: one step of a generation.

:mod:`moxe_plugin.nn.mlstm` and :mod:`moxe_plugin.nn.slstm` have the equations.
A step of a block takes four or five launches: it is bound by their number, and then by
reading each weight once, and memories twice. What is computed in between is float32.

Which expert reads a token is read by the kernels, not by the host: a launch is for all
units that there can be, and those of experts elsewhere end at once. So a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from moxe_plugin.nn.block_weights import MLSTMWeights, SLSTMWeights
from moxe_plugin.nn.mlstm_cell import MAX_EXPONENT, NORMALIZER_EPS
from moxe_plugin.nn.triton.mlstm_step_kernels import (
    mlstm_step_cell_kernel,
    mlstm_step_inputs_kernel,
    mlstm_step_output_kernel,
)
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two
from moxe_plugin.nn.triton.slstm_step_kernels import (
    slstm_step_cell_kernel,
    slstm_step_norm_kernel,
)
from moxe_plugin.nn.triton.step_products import (
    gated_product_kernel,
    norm_product_kernel,
    residual_product_kernel,
    weighted_sum_kernel,
)
from moxe_plugin.nn.triton.step_units import StepUnits

_BLOCK_IN: Final = 512
"""The inputs of a tile of a weight."""

_BLOCK_OUT: Final = 16
"""The outputs that a program has."""

_BLOCK_MEMORY: Final = 128
"""The rows, and columns, of a tile of a matrix memory."""

_BLOCK_HEAD_IN: Final = 128
"""The inputs of a tile of the weights of a head of the sLSTM."""

_BLOCK_HEAD_OUT: Final = 32
"""The outputs of a head of the sLSTM that a program has."""

_PRODUCT_WARPS: Final = 4
"""The warps of a program that multiplies."""


def step_mlstm_block(
    units: StepUnits,
    weights: MLSTMWeights,
    state: tuple[Tensor, ...],
    out: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """Apply the mLSTM block, or experts of a bank, to one token of each sequence.

    :param units: The tokens.
    :param weights: The parameters; those of a bank have E first.
    :param state: As :class:`~moxe_plugin.nn.mlstm_recurrence.MLSTMState`, contiguous;
        becomes that after the token. *Shape:* ``([E,]N,…)`` each.
    :param out: Gets the outputs. *Shape:* ``(U,M)``.
    :param num_heads: The number of heads H.
    :param eps: What norms add to the variance.

    :raises ValueError: A tensor of ``state`` is not contiguous.
    """
    _check_state(state)
    window, c, n, m = state
    weights = MLSTMWeights(*(w.contiguous() for w in weights))
    num_units, num_tokens, width = units.num_units, *units.tokens.shape
    inner_dim, block = weights.down_proj.size(-2), weights.q_proj.size(-1)
    num_blocks, head_dim = inner_dim // block, inner_dim // num_heads

    inner = units.empty(2 * inner_dim)
    launch, numbers, options = units.plan_launch()
    norm_product_kernel[num_units, ceil_div(2 * inner_dim, _BLOCK_OUT)](
        *(units.tokens, weights.norm, weights.up_proj, launch, inner, *numbers, eps),
        M=width,
        O=2 * inner_dim,
        POW_M=power_of_two(width),
        BLOCK_M=_block_in(width),
        BLOCK_O=_BLOCK_OUT,
        num_warps=_PRODUCT_WARPS,
        **options,
    )

    convolved, qkv = units.empty(inner_dim), units.empty(3 * inner_dim)
    partials = units.empty(num_blocks * 2 * num_heads)
    mlstm_step_inputs_kernel[num_units, num_blocks](
        *(inner, window, weights.conv_weight, weights.conv_bias),
        *(weights.q_proj, weights.k_proj, weights.v_proj),
        *(weights.input_gate_weight, weights.forget_gate_weight),
        *(launch, convolved, qkv, partials, *numbers, num_tokens),
        I=inner_dim,
        B=block,
        H=num_heads,
        TAPS=weights.conv_weight.size(-2),
        POW_B=power_of_two(block),
        POW_H=power_of_two(num_heads),
        **options,
    )

    hidden = units.empty(inner_dim)
    gates = partials, weights.input_gate_bias, weights.forget_gate_bias
    sizes = {
        "H": num_heads,
        "D": head_dim,
        "G": num_blocks,
        "POW_G": power_of_two(num_blocks),
    }
    tile = min(_BLOCK_MEMORY, power_of_two(head_dim))
    mlstm_step_cell_kernel[num_units, num_heads, ceil_div(head_dim, tile)](
        *(qkv, *gates, c, n, m, launch, hidden),
        *(*numbers, num_tokens, head_dim**-0.5, MAX_EXPONENT, NORMALIZER_EPS),
        **sizes,
        BLOCK_D=tile,
        BLOCK_V=tile,
        **options,
    )

    gated = units.empty(inner_dim)
    mlstm_step_output_kernel[num_units, num_heads](
        *(hidden, inner, convolved, qkv, *gates, weights.out_norm, weights.skip),
        *(n, m, launch, gated, *numbers, num_tokens, head_dim**-0.5, eps),
        **sizes,
        POW_D=power_of_two(head_dim),
        **options,
    )

    _multiply_down(units, gated, weights.down_proj, units.tokens, units.per_token, out)


def step_slstm_block(
    units: StepUnits,
    weights: SLSTMWeights,
    state: tuple[Tensor, ...],
    out: Tensor,
    eps: float,
) -> None:
    """Apply the sLSTM block, or experts of a bank, to one token of each sequence.

    :param units: The tokens.
    :param weights: The parameters; those of a bank have E first.
    :param state: As :class:`~moxe_plugin.nn.slstm_parameters.SLSTMState`, contiguous;
        becomes that after the token. *Shape:* ``([E,]N,…)`` each.
    :param out: Gets the outputs. *Shape:* ``(U,M)``.
    :param eps: What norms add to the variance.

    :raises ValueError: A tensor of ``state`` is not contiguous.
    """
    _check_state(state)
    window, c, log_n, y = state
    weights = SLSTMWeights(*(w.contiguous() for w in weights))
    num_units, num_tokens, width = units.num_units, *units.tokens.shape
    num_heads, head_dim = weights.gate_proj.shape[-4:-2]
    hidden_dim = weights.ffn_down_proj.size(-2)

    new_y = units.empty(width)
    launch, numbers, options = units.plan_launch()
    sizes = {
        "H": num_heads,
        "D": head_dim,
        "TAPS": weights.conv_weight.size(-2),
    }
    block = min(_BLOCK_HEAD_OUT, power_of_two(head_dim))
    slstm_step_cell_kernel[num_units, num_heads, ceil_div(head_dim, block)](
        *(units.tokens, weights.norm, window, weights.conv_weight, weights.conv_bias),
        *(weights.gate_proj, weights.recurrent_weight, weights.gate_bias),
        *(c, log_n, y, launch, new_y, *numbers, num_tokens, eps),
        **sizes,
        POW_M=power_of_two(width),
        BLOCK_D=min(_BLOCK_HEAD_IN, power_of_two(head_dim)),
        BLOCK_O=block,
        **options,
    )

    residual, normed = units.empty(width), units.empty(width)
    slstm_step_norm_kernel[num_units, 1](
        *(units.tokens, new_y, weights.norm, weights.out_norm, weights.ffn_norm),
        *(window, y, launch, residual, normed, *numbers, num_tokens, eps),
        **sizes,
        POW_H=power_of_two(num_heads),
        POW_D=power_of_two(head_dim),
        **options,
    )

    hidden = units.empty(hidden_dim)
    gated_product_kernel[num_units, ceil_div(hidden_dim, _BLOCK_OUT)](
        *(normed, weights.ffn_up_proj, launch, hidden, *numbers),
        M=width,
        F=hidden_dim,
        BLOCK_M=_block_in(width),
        BLOCK_O=_BLOCK_OUT,
        num_warps=_PRODUCT_WARPS,
        **options,
    )

    _multiply_down(units, hidden, weights.ffn_down_proj, residual, 1, out)


def sum_experts(
    outputs: Tensor,
    expert_weights: Tensor,
    experts: Tensor,
    num_experts: int,
    out: Tensor,
) -> None:
    """Sum the weighted outputs of each token's experts: MoxE eq. (9).

    :param outputs: What units of experts got; others are not read. *Shape:* ``(U,M)``.
    :param expert_weights: The weights of the experts. *Shape:* ``(N,K)``.
    :param experts: The expert of each unit, int64; -1 for none. *Shape:* ``(U)``.
    :param num_experts: The number of all experts.
    :param out: Gets the sums. *Shape:* ``(N,M)``.
    """
    num_tokens, top_k = expert_weights.shape
    width = outputs.size(1)

    weighted_sum_kernel[num_tokens, ceil_div(width, _BLOCK_IN)](
        *(outputs, expert_weights.contiguous(), experts, out, num_experts),
        K=top_k,
        M=width,
        BLOCK_M=_BLOCK_IN,
    )


def _check_state(state: tuple[Tensor, ...]) -> None:
    if not all(x.is_contiguous() for x in state):
        raise ValueError(
            "`state` must have contiguous tensors, which are written into, but their "
            f"strides are {[x.stride() for x in state]} of shapes "
            f"{[tuple(x.shape) for x in state]}."
        )


def _multiply_down(
    units: StepUnits,
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    units_per_residual: int,
    out: Tensor,
) -> None:
    experts, numbers, options = units.plan_launch()
    inner_dim, width = weight.shape[-2:]

    residual_product_kernel[units.num_units, ceil_div(width, _BLOCK_OUT)](
        *(x, weight, residual, experts, out, *numbers, units_per_residual),
        I=inner_dim,
        O=width,
        BLOCK_I=_block_in(inner_dim),
        BLOCK_O=_BLOCK_OUT,
        num_warps=_PRODUCT_WARPS,
        **options,
    )


def _block_in(width: int) -> int:
    return min(_BLOCK_IN, power_of_two(width))
