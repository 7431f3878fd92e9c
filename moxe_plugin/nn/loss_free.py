"""The rule of selection that evens the load of experts without a loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.init import zeros_
from typing_extensions import override

from moxe_plugin.nn.selection import ExpertSelection


class LossFreeSelection(ExpertSelection):
    """Chooses the ``top_k`` largest of probability plus a bias that evens the load.

    The bias of an expert counts in the choice only, not in the weights. After a
    training step it grows by ``bias_rate`` if the expert had less than the mean load,
    and falls if it had more: ``b_i += u sign(mean(c) - c_i)`` (Wang et al., arXiv
    2408.15664, algorithm 1). Only loads of past steps enter, hence a token's experts
    do not depend on the other tokens of its batch.

    The bias is a parameter without gradient, since fairseq2 cannot load a checkpoint
    of several FSDP processes that has a buffer.

    :param num_experts: The number of experts.
    :param top_k: The number of experts of each token.
    :param bias_rate: The step ``u`` of the bias, in units of probability.

    :raises ValueError: ``bias_rate`` is negative, or ``top_k`` not between 1 and
        ``num_experts``.
    """

    load_bias: Parameter

    def __init__(self, num_experts: int, top_k: int, bias_rate: float) -> None:
        super().__init__(num_experts)

        self._check_top_k("top_k", top_k)

        if not bias_rate >= 0.0:
            raise ValueError(
                "`bias_rate` must be greater than or equal to 0, but is "
                f"{bias_rate} instead."
            )

        self.top_k = top_k
        self.bias_rate = bias_rate

        self.load_bias = Parameter(torch.empty(num_experts), requires_grad=False)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the bias to 0."""
        zeros_(self.load_bias)

    @override
    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        scores = probs.detach() + self.load_bias.to(probs.dtype)

        return self._weigh(probs, self._rank(scores, self.top_k))

    @torch.no_grad()
    def adjust(self, expert_loads: Tensor) -> None:
        """Move the bias towards an even load.

        :param expert_loads: How many tokens each expert got in a training step, in all
            processes; integers. *Shape:* ``(E)``.
        """
        # The sign of mean minus load, in integers
        directions = (expert_loads.sum() - self.num_experts * expert_loads).sign()

        change = self.bias_rate * directions.to(self.load_bias.dtype)

        bias = self.load_bias

        if isinstance(bias, DTensor):
            # Every process has the whole change and takes its part.
            change = distribute_tensor(
                change, bias.device_mesh, bias.placements, src_data_rank=None
            )

        bias.add_(change)
