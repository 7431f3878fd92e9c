"""The router that predicts how difficult tokens are: MoxE eqs. (5)-(8)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, float32, promote_types
from torch.nn import Parameter
from torch.nn.functional import linear, pad, sigmoid, softmax
from torch.nn.init import zeros_
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from moxe_plugin.nn.backend import MAX_STEP_SEQS, ScanBackend, resolve_backend
from moxe_plugin.nn.modulation import Modulation, standard_modulation
from moxe_plugin.nn.native.router import RouterParams, RouterSettings, route_tokens
from moxe_plugin.nn.passes import has_native_dtype, passes_natively
from moxe_plugin.nn.routing import Router, Routing, lecun_normal_

if TYPE_CHECKING:
    from moxe_plugin.nn.selection import ExpertSelection


class DifficultyRouter(Router):
    """Routes hard tokens towards the mLSTM experts: MoxE eqs. (5)-(8).

    ``d = sigmoid(w_d h + b_d)``; with ``s = gamma * modulation(d)`` the mLSTM experts
    ``0 .. num_mlstm_experts - 1`` get the bias ``+s`` and all others ``-s``.

    :param model_dim: The dimensionality of the model.
    :param selection: Chooses experts by their probabilities, after the difficulty bias.
    :param num_mlstm_experts: How many of the first experts hard tokens are sent to. In
        the paper it is half of them; we leave it free.
    :param difficulty_bias_scale: The scale gamma of the bias.
    :param modulation: How strongly a difficulty acts: :func:`standard_modulation`, or
        a :class:`MaskedModulation` or :class:`ProportionalModulation`.
    :param bias: Whether the scores have a learned bias ``b_r``.
    :param backend: With ``triton`` one kernel does what follows the scores, with
        ``native`` one pass of C++ all of it, if the modulation is the standard one and
        the choice that of ``selection.fixed_top_k`` experts; all else is torch's.

    :raises ValueError: ``num_mlstm_experts`` does not fit the number of experts, or
        ``difficulty_bias_scale`` is negative.
    """

    difficulty_weight: Parameter
    difficulty_bias: Parameter

    def __init__(
        self,
        model_dim: int,
        selection: ExpertSelection,
        *,
        num_mlstm_experts: int,
        difficulty_bias_scale: float,
        modulation: Modulation = standard_modulation,
        bias: bool = False,
        backend: ScanBackend = "auto",
    ) -> None:
        super().__init__(model_dim, selection, bias=bias)

        if not 0 < num_mlstm_experts < self.num_experts:
            raise ValueError(
                "`num_mlstm_experts` must be greater than 0 and less than "
                f"`num_experts` ({self.num_experts}), but is {num_mlstm_experts} "
                "instead."
            )

        if not difficulty_bias_scale >= 0.0:
            raise ValueError(
                "`difficulty_bias_scale` must be greater than or equal to 0, but is "
                f"{difficulty_bias_scale} instead."
            )

        self.num_mlstm_experts = num_mlstm_experts
        self.difficulty_bias_scale = difficulty_bias_scale
        self.modulation = modulation
        self.backend = backend

        self.difficulty_weight = Parameter(torch.empty(model_dim))
        # FSDP2 refuses parameters without a dimension.
        self.difficulty_bias = Parameter(torch.empty(1))

        self.reset_parameters()

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()

        lecun_normal_(self.difficulty_weight, fan_in=self.model_dim)

        zeros_(self.difficulty_bias)

    @override
    def forward(self, hidden: Tensor) -> Routing:
        return self._route_natively(hidden) or super().forward(hidden)

    @override
    def _route(self, hidden: Tensor) -> Routing:
        scores = self._score_all(hidden)
        if self._has_kernel(hidden):
            return self._route_in_kernel(scores)

        logits, score = scores.split([self.num_experts, 1], dim=-1)
        difficulty = sigmoid(score)

        # What fake tensors leave behind would be of no use to others.
        make_signs: Callable[..., Tensor] = _difficulty_signs
        if is_in_torch_dispatch_mode():
            make_signs = _difficulty_signs.__wrapped__

        signs = make_signs(
            self.num_mlstm_experts,
            self.num_experts,
            self.difficulty_bias_scale,
            hidden.dtype,
            hidden.device,
        )

        # The strength times the sign: no copies of the strengths of all experts.
        biased_logits = torch.addcmul(logits, self.modulation(difficulty), signs)

        probs = softmax(biased_logits, dim=-1)

        return Routing(
            logits,
            biased_logits,
            probs,
            softmax(logits, dim=-1),
            difficulty.squeeze(-1),
            *self.selection(probs),
        )

    def _score_all(self, hidden: Tensor) -> Tensor:
        if (
            hidden.size(0) <= MAX_STEP_SEQS
            and not torch.is_grad_enabled()
            and self._has_kernel(hidden)
        ):
            # Imports Triton, which not every machine has.
            from moxe_plugin.nn.triton.router_scores import score_tokens

            return score_tokens(
                *(hidden.contiguous(), self.weight, self.bias),
                *(self.difficulty_weight, self.difficulty_bias),
            )

        # (T,M) -> (T,E+1): one product reads the hidden states once.
        weight = torch.cat([self.weight, self.difficulty_weight.unsqueeze(0)])
        if self.bias is None:
            bias = pad(self.difficulty_bias, (self.num_experts, 0))
        else:
            bias = torch.cat([self.bias, self.difficulty_bias])

        return linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))

    def _route_natively(self, hidden: Tensor) -> Routing | None:
        # What counts FLOPs, or fakes tensors, must see what is computed.
        if not self._is_standard("native", hidden) or is_in_torch_dispatch_mode():
            return None

        params = RouterParams(
            *(self.weight, self.bias, self.difficulty_weight, self.difficulty_bias)
        )

        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.dtype != self.weight.dtype:
                hidden = hidden.to(promote_types(hidden.dtype, float32))

            if not has_native_dtype(hidden) or not passes_natively(
                "router", hidden, *(x for x in params if x is not None)
            ):
                return None

            return route_tokens(
                *(hidden, params),
                RouterSettings(
                    *(self.num_mlstm_experts, self.difficulty_bias_scale),
                    self._fixed_top_k,
                ),
            )

    def _has_kernel(self, hidden: Tensor) -> bool:
        return self._is_standard("triton", hidden)

    def _is_standard(self, backend: ScanBackend, hidden: Tensor) -> bool:
        return (
            resolve_backend(self.backend, hidden) == backend
            and self.modulation is standard_modulation
            and self.selection.fixed_top_k is not None
        )

    def _route_in_kernel(self, scores: Tensor) -> Routing:
        from moxe_plugin.nn.triton.route import route_scores

        return Routing(
            scores[:, : self.num_experts],
            *route_scores(
                scores,
                num_mlstm_experts=self.num_mlstm_experts,
                difficulty_bias_scale=self.difficulty_bias_scale,
                top_k=self._fixed_top_k,
            ),
        )

    @property
    def _fixed_top_k(self) -> int:
        top_k = self.selection.fixed_top_k
        assert top_k is not None

        return top_k


# Without a limit: a CUDA graph may read them.
@cache
def _difficulty_signs(
    num_mlstm_experts: int,
    num_experts: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # An evaluation may be first, whose tensors could not be used in training.
    with torch.inference_mode(False):
        signs = torch.full((num_experts,), -scale, dtype=dtype, device=device)
        signs[:num_mlstm_experts] = scale

    return signs
