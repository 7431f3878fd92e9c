"""Queries, keys, values and gates of mLSTM blocks in C++, in one pass each way.

::

    q = u W_q;  k = u W_k;  v = a W_v        in G groups of channels each
    [i, f] = [q, k, v] [W_i, W_f] + [b_i, b_f]

Of rows a and u (what is convolved, and became of it), q, k and v are ``(C,I)``, and
[i, f], pre-activations, ``(C,2H)``; the weights of E experts are ``(E,G,I/G,I/G)`` and
``(E,3*I,H)``, biases ``(E,H)``.

Their products are small, so that passes over memory take as long as they do. Under
autocast, factors are rounded as :mod:`moxe_plugin.nn.native.products` rounds them. Of
bfloat16, sums are float32, and rounded when they are written; gates stay float32.
Blocks in C++ call them, see :mod:`moxe_plugin.nn.native.block_calls`.
"""

from __future__ import annotations

from typing import Final

_GROUP_WIDTH: Final = 32
"""The channels of a group, and"""

_MAX_GATES: Final = 16
"""the gates of all heads, that the C++ code is made for."""


def fits(group_width: int, num_heads: int) -> bool:
    """Tell whether the C++ code is made for some sizes.

    :param group_width: How many channels are projected at a time.
    :param num_heads: The number of heads H.

    :returns: Whether it is.
    """
    return group_width == _GROUP_WIDTH and 2 * num_heads <= _MAX_GATES
