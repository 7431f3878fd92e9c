"""The gated feed-forward network of the sLSTM block, and of feed-forward experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, init

from moxe_plugin.nn.native.gating import silu_product
from moxe_plugin.nn.passes import has_native_dtype, passes_natively
from moxe_plugin.nn.stacked import expert_parameter, project


class GatedFeedForward(Module):
    """SiLU-gated feed-forward network: ``(silu(x W_g) * (x W_v)) W_down``, no biases.

    :param model_dim: The width of input and output.
    :param hidden_dim: The width in between.
    :param up_std: The standard deviation of the initial ``W_g`` and ``W_v``.
    :param down_std: The standard deviation of the initial ``W_down``.
    :param num_experts: The number of stacked networks; ``None`` for a single one.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        up_std: float,
        down_std: float,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()

        self.up_std = up_std
        self.down_std = down_std

        # The first half of `up_proj` is the gate.
        self.up_proj = expert_parameter(num_experts, model_dim, 2 * hidden_dim)
        self.down_proj = expert_parameter(num_experts, hidden_dim, model_dim)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both projections from normal distributions."""
        init.normal_(self.up_proj, std=self.up_std)
        init.normal_(self.down_proj, std=self.down_std)

    def forward(self, seqs: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Apply the network to each position.

        :param seqs: *Shape:* ``([E,]N,S,M)``, or ``(C,M)``.
        :param counts: The rows of each expert, if ``seqs`` are rows ``(C,M)``.

        :returns: The results, as ``seqs``.
        """
        joint = project(seqs, self.up_proj, counts)

        if has_native_dtype(joint) and passes_natively("gating", joint):
            gated = silu_product(joint)
        else:
            gate, value = joint.chunk(2, dim=-1)
            gated = F.silu(gate) * value

        return project(gated, self.down_proj, counts)
