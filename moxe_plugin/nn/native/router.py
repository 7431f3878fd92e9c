"""A difficulty router, in C++: scores, bias, probabilities and choices in one pass.

MoxE eqs. (5)-(9): ``z = W_r h (+ b_r)``, ``d = sigmoid(w_d h + b_d)``, and ``p`` is
the softmax of ``z + gamma d`` at the mLSTM experts, which come first, and of ``z -
gamma d`` at all others; the K most probable ones get the weights ``p_i / sum_j p_j``,
j over these K. So the bias acts in full
(:func:`~moxe_plugin.nn.modulation.standard_modulation`). What is kept in bfloat16 is
computed in float32.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.native.library import (
    SUFFIXES,
    find_function,
    int64_array,
    pointers_to,
)
from moxe_plugin.nn.routing import Routing


class RouterParams(NamedTuple):
    """The parameters of a router, all of one type."""

    weight: Tensor
    """W_r. *Shape:* ``(E,M)``."""

    bias: Tensor | None
    """b_r, if there is one. *Shape:* ``(E)``."""

    difficulty_weight: Tensor
    """w_d. *Shape:* ``(M)``."""

    difficulty_bias: Tensor
    """b_d. *Shape:* ``(1)``."""


class RouterSettings(NamedTuple):
    """What a router does with its scores."""

    num_mlstm_experts: int
    """How many of the first experts hard tokens are sent to."""

    difficulty_bias_scale: float
    """The scale gamma of the bias."""

    top_k: int
    """The number of experts of each token, K."""


def route_tokens(
    hidden: Tensor, params: RouterParams, settings: RouterSettings
) -> Routing:
    """Route tokens.

    All tensors are of one dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`,
    and on the CPU.

    :param hidden: The tokens. *Shape:* ``(T,M)``.
    :param params: The router's parameters.
    :param settings: The router's settings.

    :returns: Where the tokens go, in float32, or float64 if they are. Of experts with
        equal probability the one with the lower index comes first.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return Routing(*_RouteTokens.apply(settings, hidden, *params))  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class _RouteTokens(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        settings: RouterSettings,
        hidden: Tensor,
        weight: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        params = weight, *(None if x is None else x.contiguous() for x in others)
        num_tokens, num_experts = hidden.size(0), weight.size(0)
        wide = torch.promote_types(hidden.dtype, torch.float32)

        def make(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return hidden.new_empty(shape, dtype=dtype)

        results = [
            *make(4, num_tokens, num_experts).unbind(),
            make(num_tokens),
            make(num_tokens, settings.top_k, dtype=torch.int64),
            make(num_tokens, settings.top_k),
        ]
        _call("forward", settings, num_experts, hidden, *params, *results)

        ctx.save_for_backward(hidden, *params, *results[2:6])
        ctx.settings = settings
        # Those of experts
        ctx.mark_non_differentiable(results[5])
        # The indices would get zeros too.
        ctx.set_materialize_grads(False)

        return tuple(results)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, difficulty_weight, difficulty_bias, *results = (
            ctx.saved_tensors
        )

        # Of a stack of layers these are often parts, or expanded.
        of_results = [
            None if x is None else x.contiguous() for x in (*grads[:5], grads[6])
        ]
        of_params = [
            None if x is None else torch.empty_like(x)
            for x in (hidden, weight, bias, difficulty_weight, difficulty_bias)
        ]
        _call(
            *("backward", ctx.settings, weight.size(0), hidden),
            *(weight, difficulty_weight, *results, *of_results, *of_params),
        )

        return None, *of_params


def _call(
    direction: str,
    settings: RouterSettings,
    num_experts: int,
    hidden: Tensor,
    *others: Tensor | None,
) -> None:
    num_mlstm_experts, scale, top_k = settings

    function = find_function(
        "router", f"moxe_route_{direction}_{SUFFIXES[hidden.dtype]}"
    )

    # Each tensor lives until the call returns: the caller holds them.
    function(
        int64_array([*hidden.shape, num_experts, num_mlstm_experts, top_k]),
        ctypes.c_double(scale),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(hidden, *others),
    )
