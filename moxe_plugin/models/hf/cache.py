"""The key-value cache of a transformers model as a state of fairseq2."""

from __future__ import annotations

from typing import cast, final

from fairseq2.nn import IncrementalState
from torch import LongTensor, Tensor
from transformers import DynamicCache
from typing_extensions import override


@final
class HfCacheState(IncrementalState):
    """Keeps the keys and values of the tokens seen so far.

    :param cache: The cache, which the model extends in place.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache

    @override
    def reorder(self, new_order: Tensor) -> None:
        self.cache.reorder_cache(cast(LongTensor, new_order))

    @override
    def size_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.cache.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )

    @override
    def capacity_bytes(self) -> int:
        return self.size_bytes()
