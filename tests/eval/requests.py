"""Requests as lm-evaluation-harness makes them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance


def make_requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Make requests.

    :param kind: The method of the model that answers them.
    :param arguments: What each asks.

    :returns: The requests.
    """
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i)
        for i, a in enumerate(arguments)
    ]
