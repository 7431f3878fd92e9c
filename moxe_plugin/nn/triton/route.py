"""What a difficulty router does with its scores, as one Triton kernel each way.

MoxE eqs. (5)-(9) after the product with the hidden states, with the bias in full
(:func:`~moxe_plugin.nn.modulation.standard_modulation`) and the choice of the K most
probable experts; the numbers of a token never leave a program's registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two

_BLOCK_TOKENS = 64


class RoutedScores(NamedTuple):
    """What :func:`route_scores` computes, in float32; as in ``Routing``."""

    biased_logits: Tensor
    """*Shape:* ``(T,E)``."""

    router_probs: Tensor
    """*Shape:* ``(T,E)``."""

    unbiased_probs: Tensor
    """*Shape:* ``(T,E)``."""

    difficulty: Tensor
    """*Shape:* ``(T)``."""

    expert_indices: Tensor
    """Of experts with equal probability the one with the lower index comes first;
    int64. *Shape:* ``(T,K)``."""

    expert_weights: Tensor
    """*Shape:* ``(T,K)``."""


def route_scores(
    scores: Tensor,
    *,
    num_mlstm_experts: int,
    difficulty_bias_scale: float,
    top_k: int,
) -> RoutedScores:
    """Route tokens by their scores.

    :param scores: The scores of the experts, and that of the difficulty; float32.
        *Shape:* ``(T,E+1)``.
    :param num_mlstm_experts: How many of the first experts hard tokens are sent to.
    :param difficulty_bias_scale: The scale gamma of the bias.
    :param top_k: The number of experts of each token.

    :returns: Where the tokens go.
    """
    return RoutedScores(
        *_RouteScores.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            scores,
            (num_mlstm_experts, float(difficulty_bias_scale), top_k),
        )
    )


class _RouteScores(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        scores: Tensor,
        settings: tuple[int, float, int],
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = scores.size(0), scores.size(1) - 1
        top_k = settings[2]

        scores = scores.contiguous()
        biased, probs, unbiased = scores.new_empty(3, num_tokens, num_experts).unbind()
        difficulty = scores.new_empty(num_tokens)
        indices = scores.new_empty(num_tokens, top_k, dtype=torch.int64)
        weights = scores.new_empty(num_tokens, top_k)

        if num_tokens > 0:
            _route_kernel[(ceil_div(num_tokens, _BLOCK_TOKENS),)](
                *(scores, biased, probs, unbiased, difficulty),
                *(indices, weights, num_tokens),
                **_constants(num_experts, settings),
            )

        ctx.save_for_backward(probs, unbiased, difficulty, indices, weights)
        ctx.settings = settings
        ctx.mark_non_differentiable(indices)
        # The indices would get zeros too.
        ctx.set_materialize_grads(False)

        return biased, probs, unbiased, difficulty, indices, weights

    @staticmethod
    @override
    @once_differentiable
    def backward(
        ctx: Any,
        grad_biased: Tensor | None,
        grad_probs: Tensor | None,
        grad_unbiased: Tensor | None,
        grad_difficulty: Tensor | None,
        _: None,
        grad_weights: Tensor | None,
    ) -> tuple[Tensor, None]:
        probs, unbiased, difficulty, indices, weights = ctx.saved_tensors
        num_tokens, num_experts = probs.shape

        def given(grad: Tensor | None, output: Tensor) -> Tensor:
            return torch.zeros_like(output) if grad is None else grad

        # Of a stack of layers these are often parts, or expanded.
        grad_biased = given(grad_biased, probs)
        grad_probs = given(grad_probs, probs)
        grad_unbiased = given(grad_unbiased, probs)
        grad_difficulty = given(grad_difficulty, difficulty)
        grad_weights = given(grad_weights, weights).contiguous()

        grad_scores = probs.new_empty(num_tokens, num_experts + 1)

        if num_tokens > 0:
            _route_backward_kernel[(ceil_div(num_tokens, _BLOCK_TOKENS),)](
                *(probs, unbiased, difficulty, indices, weights),
                *(grad_biased, grad_probs, grad_unbiased, grad_difficulty),
                *(grad_weights, grad_scores, num_tokens),
                *(grad_biased.stride(0), grad_biased.stride(1)),
                *(grad_probs.stride(0), grad_probs.stride(1)),
                *(grad_unbiased.stride(0), grad_unbiased.stride(1)),
                grad_difficulty.stride(0),
                **_constants(num_experts, ctx.settings),
            )

        return grad_scores, None


def _constants(num_experts: int, settings: tuple[int, float, int]) -> dict[str, Any]:
    num_mlstm_experts, scale, top_k = settings

    return {
        "SCALE": scale,
        "NUM_MLSTM": num_mlstm_experts,
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "BLOCK_TOKENS": _BLOCK_TOKENS,
        "BLOCK_EXPERTS": power_of_two(num_experts),
    }


@triton.jit
def _softmax(logits):  # type: ignore[no-untyped-def]  # Triton has no annotations
    exps = tl.exp(logits - tl.max(logits, 1)[:, None])

    return exps / tl.sum(exps, 1)[:, None]


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _route_kernel(  # type: ignore[no-untyped-def]  # as above
    scores,
    biased_logits,
    router_probs,
    unbiased_probs,
    difficulty,
    expert_indices,
    expert_weights,
    num_tokens,
    SCALE: tl.constexpr,
    NUM_MLSTM: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    is_token = token < num_tokens
    is_expert = expert < NUM_EXPERTS
    mask = is_token[:, None] & is_expert

    row = scores + token * (NUM_EXPERTS + 1)
    logits = tl.load(row[:, None] + expert, mask=mask, other=0.0)
    score = tl.load(row + NUM_EXPERTS, mask=is_token, other=0.0)

    hardness = tl.sigmoid(score)
    sign = tl.where(expert < NUM_MLSTM, SCALE, -SCALE)
    biased = logits + hardness[:, None] * sign

    probs = _softmax(tl.where(is_expert, biased, float("-inf")))
    unbiased = _softmax(tl.where(is_expert, logits, float("-inf")))

    # What is no number is the greatest, as where torch sorts: the choice is distinct.
    rest = tl.where(is_expert, probs, float("-inf"))
    rest = tl.where(rest == rest, rest, float("inf"))
    rank = tl.full((BLOCK_TOKENS, BLOCK_EXPERTS), -1, tl.int32)
    for k in tl.static_range(TOP_K):
        is_best = rest == tl.max(rest, 1)[:, None]
        best = tl.min(tl.where(is_best, expert, BLOCK_EXPERTS), 1)[:, None]
        rank = tl.where(expert == best, k, rank)
        rest = tl.where(expert == best, float("-inf"), rest)

    total = tl.sum(tl.where(rank >= 0, probs, 0.0), 1)

    at = token[:, None] * NUM_EXPERTS + expert
    tl.store(biased_logits + at, biased, mask=mask)
    tl.store(router_probs + at, probs, mask=mask)
    tl.store(unbiased_probs + at, unbiased, mask=mask)
    tl.store(difficulty + token, hardness, mask=is_token)

    choice = token[:, None] * TOP_K + rank
    is_chosen = mask & (rank >= 0)
    experts = tl.broadcast_to(expert, (BLOCK_TOKENS, BLOCK_EXPERTS))
    tl.store(expert_indices + choice, experts, mask=is_chosen)
    tl.store(expert_weights + choice, probs / total[:, None], mask=is_chosen)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _route_backward_kernel(  # type: ignore[no-untyped-def]  # as above
    router_probs,
    unbiased_probs,
    difficulty,
    expert_indices,
    expert_weights,
    grad_biased,
    grad_probs,
    grad_unbiased,
    grad_difficulty,
    grad_weights,
    grad_scores,
    num_tokens,
    biased_stride,
    biased_step,
    probs_stride,
    probs_step,
    unbiased_stride,
    unbiased_step,
    difficulty_stride,
    SCALE: tl.constexpr,
    NUM_MLSTM: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    is_token = token < num_tokens
    mask = is_token[:, None] & (expert < NUM_EXPERTS)
    tokens = token[:, None]

    at = tokens * NUM_EXPERTS + expert
    probs = tl.load(router_probs + at, mask=mask, other=0.0)
    unbiased = tl.load(unbiased_probs + at, mask=mask, other=0.0)
    hardness = tl.load(difficulty + token, mask=is_token, other=0.0)

    at = grad_biased + tokens * biased_stride + expert * biased_step
    grad_b = tl.load(at, mask=mask, other=0.0)
    at = grad_probs + tokens * probs_stride + expert * probs_step
    grad_p = tl.load(at, mask=mask, other=0.0)
    at = grad_unbiased + tokens * unbiased_stride + expert * unbiased_step
    grad_u = tl.load(at, mask=mask, other=0.0)
    at = grad_difficulty + token * difficulty_stride
    grad_d = tl.load(at, mask=is_token, other=0.0)

    # Of the chosen probabilities, through their weights
    total = tl.zeros((BLOCK_TOKENS,), tl.float32)
    mean = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        chosen = tl.load(expert_indices + choice, mask=is_token, other=0)
        weight = tl.load(expert_weights + choice, mask=is_token, other=0.0)
        grad = tl.load(grad_weights + choice, mask=is_token, other=0.0)
        mean += weight * grad
        total += tl.sum(tl.where(expert == chosen[:, None], probs, 0.0), 1)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        chosen = tl.load(expert_indices + choice, mask=is_token, other=0)
        grad = tl.load(grad_weights + choice, mask=is_token, other=0.0)
        through = (grad - mean) / tl.where(is_token, total, 1.0)
        grad_p += tl.where(expert == chosen[:, None], through[:, None], 0.0)

    grad_b += probs * (grad_p - tl.sum(probs * grad_p, 1)[:, None])
    grad_l = grad_b + unbiased * (grad_u - tl.sum(unbiased * grad_u, 1)[:, None])

    sign = tl.where(expert < NUM_MLSTM, SCALE, -SCALE)
    grad_d += tl.sum(grad_b * sign, 1)

    row = grad_scores + token * (NUM_EXPERTS + 1)
    tl.store(row[:, None] + expert, grad_l, mask=mask)
    tl.store(row + NUM_EXPERTS, grad_d * hardness * (1.0 - hardness), mask=is_token)
