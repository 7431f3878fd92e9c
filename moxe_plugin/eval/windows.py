"""How much a model reads at a time, and how a longer text is cut."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Window = tuple[None, list[int], list[int]]
"""No request of its own, the context, and the tokens to predict."""


def cut_windows(
    texts: Sequence[Sequence[int]], prefix_token_id: int, max_length: int
) -> tuple[list[Window], list[int]]:
    """Cut whole texts into windows, in which each token is predicted once.

    The first window follows the prefix token; later ones follow the last token of the
    window before, and the last one reaches back until it is full.

    :param texts: Token ids.
    :param prefix_token_id: The token that stands in for an empty context.
    :param max_length: The most tokens that the model reads at a time.

    :returns: The windows, and the text of each by its number.
    """
    windows: list[Window] = []
    owners = []

    for owner, tokens in enumerate(texts):
        for window in get_rolling_token_windows(
            tokens,
            prefix_token=prefix_token_id,
            max_seq_len=max_length,
            context_len=1,
        ):
            windows.append((None, *make_disjoint_window(window)))
            owners.append(owner)

    return windows, owners


def check_length(name: str, value: int | None, *, default: int) -> int:
    """Choose a length.

    :param name: What messages call it.
    :param value: What is asked for.
    :param default: What it is if ``value`` is ``None``.

    :returns: The length.

    :raises ValueError: It is not a positive whole number.
    """
    if value is None:
        return default

    # From a command line it can be a text, or -3.0.
    if not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"`{name}` must be a whole number, but is '{value}' instead.")

    if value < 1:
        raise ValueError(f"`{name}` must be positive, but is {value} instead.")

    return value
