"""How strongly a predicted difficulty acts on the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn.functional import relu

Modulation: TypeAlias = Callable[[Tensor], Tensor]
"""Maps difficulties ``d`` to strengths of the bias, before its scale gamma."""


def standard_modulation(difficulty: Tensor) -> Tensor:
    """Let every difficulty act in full: ``d``.

    :param difficulty: Difficulties in [0, 1]. *Shape:* any.

    :returns: The strengths of the bias. *Shape:* as ``difficulty``.
    """
    return difficulty


@dataclass(frozen=True)
class MaskedModulation:
    """Lets only great difficulties act, in full: ``d * 1[d > threshold]``."""

    threshold: float
    """The difficulty, in [0, 1], up to which there is no bias."""

    def __call__(self, difficulty: Tensor) -> Tensor:
        """Compute strengths as :func:`standard_modulation` does.

        :param difficulty: Difficulties in [0, 1]. *Shape:* any.

        :returns: The strengths of the bias. *Shape:* as ``difficulty``.
        """
        return difficulty.where(difficulty > self.threshold, 0.0)


@dataclass(frozen=True)
class ProportionalModulation:
    """Lets the excess of a difficulty act: ``relu(d - threshold)``."""

    threshold: float
    """The difficulty, in [0, 1], from which on the bias grows."""

    def __call__(self, difficulty: Tensor) -> Tensor:
        """Compute strengths as :func:`standard_modulation` does.

        :param difficulty: Difficulties in [0, 1]. *Shape:* any.

        :returns: The strengths of the bias. *Shape:* as ``difficulty``.
        """
        return relu(difficulty - self.threshold)
