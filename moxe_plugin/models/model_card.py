"""Refuses model cards that would let a checkpoint run code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def check_model_card(card: Mapping[str, object], file: Path) -> None:
    """Check ``model.yaml`` of a training run, which may come from anyone.

    fairseq2 takes two orders from it that open the door to code: ``restrict: false``
    has the parameters unpickled without restriction, and ``trust_remote_code: true`` in
    the configuration of a model of Hugging Face runs Python files. No training writes
    either; who means them puts them into an asset card of their own.

    :param card: The content.
    :param file: Where it is from.

    :raises ValueError: It gives one of these orders.
    """
    for key, safe in (("restrict", True), ("trust_remote_code", False)):
        if _is_set_to_other(card, key, safe):
            raise ValueError(
                f"`{key}` in '{file}' must be left out, since it lets the checkpoint "
                "run code. Remove the line, or write an asset card of your own if you "
                "trust the checkpoint."
            )


def _is_set_to_other(value: object, key: str, safe: bool) -> bool:
    if isinstance(value, Mapping):
        if value.get(key, safe) is not safe:
            return True

        return any(_is_set_to_other(v, key, safe) for v in value.values())

    if isinstance(value, list):
        return any(_is_set_to_other(v, key, safe) for v in value)

    return False
