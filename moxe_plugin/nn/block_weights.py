"""The parameters of a whole block, as the functions that compute it take them.

Those of a bank have E first; see the blocks for their shapes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MLSTMWeights(NamedTuple):
    """The parameters of :class:`~moxe_plugin.nn.mlstm.MLSTMBlock`."""

    norm: Tensor
    up_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    input_gate_weight: Tensor
    forget_gate_weight: Tensor
    input_gate_bias: Tensor
    forget_gate_bias: Tensor
    out_norm: Tensor
    skip: Tensor
    down_proj: Tensor


class SLSTMWeights(NamedTuple):
    """The parameters of :class:`~moxe_plugin.nn.slstm.SLSTMBlock`."""

    norm: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    gate_proj: Tensor
    recurrent_weight: Tensor
    gate_bias: Tensor
    out_norm: Tensor
    ffn_norm: Tensor
    ffn_up_proj: Tensor
    ffn_down_proj: Tensor
