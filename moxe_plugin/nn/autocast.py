"""Functions with a gradient whose products follow autocast on the CPU, both ways.

PyTorch's ``custom_fwd`` and ``custom_bwd`` with types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.amp.autocast_mode import custom_bwd, custom_fwd

_F = TypeVar("_F", bound=Callable[..., Any])


def remembers_autocast(forward: _F) -> _F:
    """Let a function remember whether it ran under autocast.

    :param forward: Its ``forward``, below ``staticmethod``.

    :returns: The same, decorated.
    """
    return custom_fwd(forward, device_type="cpu")  # type: ignore[no-any-return]  # torch leaves it untyped


def recalls_autocast(backward: _F) -> _F:
    """Let gradients be computed under autocast if the function was.

    :param backward: Its ``backward``, below ``staticmethod``.

    :returns: The same, decorated.
    """
    return custom_bwd(backward, device_type="cpu")  # type: ignore[no-any-return]  # as above
