"""A difficulty router's scores of a few tokens, as one Triton kernel without gradients.

As torch's operations it is half a dozen launches, of which a step of a generation would
consist to a third.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import power_of_two

_BLOCK_M = 128


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    difficulty_weight: Tensor,
    difficulty_bias: Tensor,
) -> Tensor:
    """Multiply tokens with the weights of all scores.

    Computed in float32; parameters may be of any type.

    :param hidden: Contiguous. *Shape:* ``(T,M)``.
    :param weight: That of the experts' scores. *Shape:* ``(E,M)``.
    :param bias: Theirs, if they have one. *Shape:* ``(E)``.
    :param difficulty_weight: That of the difficulty's score. *Shape:* ``(M)``.
    :param difficulty_bias: Its bias. *Shape:* ``(1)``.

    :returns: The scores of the experts, and that of the difficulty; of the type of
        ``hidden``. *Shape:* ``(T,E+1)``.
    """
    num_tokens, width = hidden.shape
    num_experts = weight.size(0)
    scores = hidden.new_empty(num_tokens, num_experts + 1)

    if num_tokens > 0:
        _score_kernel[(num_tokens,)](
            *(hidden, weight.contiguous(), difficulty_weight.contiguous()),
            # Without a bias any pointer does: nothing is read.
            *(difficulty_bias, difficulty_bias if bias is None else bias, scores),
            E=num_experts,
            M=width,
            POW_E=power_of_two(num_experts),
            BLOCK_M=_BLOCK_M,
            HAS_BIAS=bias is not None,
        )

    return scores


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _score_kernel(  # type: ignore[no-untyped-def]  # as above
    hidden,
    weight,
    difficulty_weight,
    difficulty_bias,
    bias,
    scores,
    E: tl.constexpr,
    M: tl.constexpr,
    POW_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, POW_E)
    total = tl.zeros((POW_E,), tl.float32)
    difficulty = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        h = tl.load(hidden + token * M + m, mask=m < M, other=0.0).to(tl.float32)
        tile = tl.load(
            weight + e[:, None] * M + m[None, :],
            mask=(e < E)[:, None] & (m < M)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(tile * h[None, :], 1)
        vector = tl.load(difficulty_weight + m, mask=m < M, other=0.0)
        difficulty += h * vector.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)

    at = scores + token * (E + 1)
    tl.store(at + e, total, mask=e < E)
    tl.store(at + E, tl.sum(difficulty, 0) + tl.load(difficulty_bias).to(tl.float32))
