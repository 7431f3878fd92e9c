"""Ties a response cache of lm-evaluation-harness to the one model that filled it.

``lm_eval --use_cache FILE`` looks answers up by the text of a request alone. With the
same file for two models, the second would get the answers of the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from typing import Any, Final

import torch
from torch.nn import Module

_OWNER_KEY: Final = "moxe_plugin.eval.response_cache:owner"


def claim_response_cache(
    cache: MutableMapping[str, Any], model: Module, settings: object
) -> None:
    """Write a model's fingerprint into a cache, or check the one that is there.

    :param cache: The responses by the hash of their request.
    :param model: The model whose responses the cache holds.
    :param settings: What else the responses depend on; its ``repr`` is compared.

    :raises ValueError: The cache holds responses of another model, or of the same with
        other settings.
    """
    digest = hashlib.sha256(repr(settings).encode())

    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().tobytes())

    fingerprint = digest.hexdigest()

    if len(cache) == 0:
        cache[_OWNER_KEY] = fingerprint
    elif cache.get(_OWNER_KEY) != fingerprint:
        raise ValueError(
            "`use_cache` must name one file per model, but this file holds responses "
            "of another model, or of this one with other settings. Use another file, "
            "or delete it."
        )
