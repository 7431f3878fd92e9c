"""Who reads which token in a step of a generation: see :mod:`.block_steps`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepUnits(NamedTuple):
    """Tokens and who reads them. A unit is a token and one expert, or the block.

    U is N times K, the experts of a token; unit ``n*K+k`` is the k-th of token n.
    """

    tokens: Tensor
    """Contiguous. *Shape:* ``(N,M)``."""

    experts: Tensor | None = None
    """The expert of each unit, int64; -1 for none. ``None`` of a block that stands
    alone. *Shape:* ``(U)``."""

    first: int = 0
    """The number of the bank's first expert."""

    num_experts: int = 1
    """How many experts the bank has; units of others are left alone."""

    per_token: int = 1
    """The experts K of a token."""

    @property
    def num_units(self) -> int:
        """The number of units U."""
        return self.tokens.size(0) * self.per_token

    def empty(self, width: int) -> Tensor:
        """Create a tensor for intermediate results.

        :param width: The number of channels.

        :returns: Uninitialised, float32. *Shape:* ``(U,width)``.
        """
        return self.tokens.new_empty(self.num_units, width, dtype=torch.float32)

    def plan_launch(self) -> tuple[Tensor, tuple[int, int, int], dict[str, bool]]:
        """List what all kernels want to know of the units.

        :returns: The experts, of which nothing is read without them; the numbers
            ``first``, ``E`` and ``K``; and the constants.
        """
        # Any pointer does where nothing is read.
        experts = self.tokens if self.experts is None else self.experts
        numbers = self.first, self.num_experts, self.per_token

        return experts, numbers, {"HAS_EXPERTS": self.experts is not None}
