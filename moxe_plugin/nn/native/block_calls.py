"""What whole blocks in C++ have in common: what they are told, and what they call.

A part of a block is one call, which makes the many calls of its passes and products:
from Python, each would take longer than some of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn.native.block_params import BlockRows
from moxe_plugin.nn.native.library import (
    SUFFIXES,
    NativeSource,
    find_function,
    int64_array,
    pointers_to,
)
from moxe_plugin.nn.native.products import Rounding, find_suffix, rounding_now

FunctionName: TypeAlias = tuple[NativeSource, str]
"""The C++ file of a function, and its name up to the suffix of a type."""

_SHARED: Final[Sequence[FunctionName]] = (
    ("scale_norm", "moxe_norm_forward"),
    ("scale_norm", "moxe_norm_backward"),
    ("causal_conv", "moxe_conv_forward"),
    ("causal_conv", "moxe_conv_backward"),
)
"""What both kinds of blocks call, after products: ``BlockFunctions`` of the C++
code."""

_WITH_PRODUCTS: Final = frozenset({"mlstm_projections", "slstm_scan"})
"""The files with products of their own."""


class BlockSizes(NamedTuple):
    """The sizes of a block."""

    num_taps: int
    """Of its convolution, K."""

    model_dim: int
    """M."""

    inner_dim: int
    """Of the mLSTM's branch, or of the sLSTM's feed-forward."""

    num_heads: int
    """H."""


class BlockCalls:
    """Calls the parts of a block in C++, over certain rows.

    :param source: The file of the block.
    :param functions: What its kind calls besides what both do.
    :param flat: The rows that go in; the others are of their type, float32 or bfloat16.
        *Shape:* ``(C,M)``.
    :param rows: Whose rows they are.
    :param sizes: The sizes of the block.
    :param eps: What norms add to the variance.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """

    def __init__(
        self,
        source: NativeSource,
        functions: Sequence[FunctionName],
        flat: Tensor,
        rows: BlockRows,
        sizes: BlockSizes,
        eps: float,
    ) -> None:
        num_experts, rounding = len(rows.counts), rounding_now()

        self._source = source
        self._rows = rows
        self._eps = eps
        self._functions = _find_functions(tuple(functions), flat.dtype, rounding)
        self._numbers = int64_array(
            (
                *(flat.element_size(), rounding, torch.get_num_threads()),
                *(num_experts, flat.size(0), len(rows.run_lens) // num_experts),
                *sizes,
            )
        )

    def call(
        self,
        name: str,
        numbers: Sequence[int],
        *tensors: Sequence[Tensor | None] | Tensor,
        seqs: Sequence[Tensor] = (),
        constants: Sequence[float] = (),
    ) -> None:
        """Call a function of the block.

        :param name: Its name.
        :param numbers: What it is told of its kind.
        :param tensors: What it reads and writes, contiguous; several make one argument.
            They live until this returns: the caller holds them.
        :param seqs: Where sequences stand, contiguous and held by the caller.
        :param constants: Numbers besides ``eps``.

        :raises MemoryError: There is no memory.
        """
        lacks_memory = find_function(self._source, name)(
            *(self._functions, self._numbers, int64_array(numbers)),
            *(ctypes.c_void_p(x.buffer_info()[0]) for x in self._rows),
            *pointers_to(*seqs),
            *(ctypes.c_double(x) for x in (self._eps, *constants)),
            *(
                ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else _list(x)
                for x in tensors
            ),
        )

        if lacks_memory:
            raise MemoryError(f"There is no memory for `{name}`.")


def _list(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    # Their addresses, as one argument
    return (ctypes.c_void_p * len(tensors))(
        *[None if x is None else x.data_ptr() for x in tensors]
    )


@cache
def _find_functions(
    functions: tuple[FunctionName, ...], dtype: torch.dtype, rounding: Rounding
) -> ctypes.Array[ctypes.c_void_p]:
    found = [find_function("products", "moxe_multiply")]

    for source, name in (*_SHARED, *functions):
        suffix = SUFFIXES[dtype]
        if source in _WITH_PRODUCTS:
            suffix = find_suffix(dtype, rounding)

        found.append(find_function(source, f"{name}_{suffix}"))

    return (ctypes.c_void_p * len(found))(
        *[ctypes.cast(x, ctypes.c_void_p).value for x in found]
    )
