"""How one token of each sequence runs through all banks of a layer's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from moxe_plugin.nn.expert_device_steps import step_bank_on_device
from moxe_plugin.nn.expert_states import Bank, ExpertsState
from moxe_plugin.nn.expert_steps import Choices, step_bank
from moxe_plugin.nn.routing import Routing


def step_banks(
    banks: Sequence[Bank],
    seqs: Tensor,
    routing: Routing,
    choices: Mapping[int, Choices] | None,
    state: ExpertsState | None,
) -> Tensor:
    """Apply the experts that tokens chose, bank by bank.

    :param banks: The banks.
    :param seqs: *Shape:* ``(N,1,M)``.
    :param routing: Where the tokens go.
    :param choices: What the host knows of that; ``None`` if it does not ask.
    :param state: Becomes that after the tokens; ``None`` if experts have no memory.

    :returns: The weighted sums, as ``seqs``.
    """
    tokens, weights = seqs.squeeze(1), routing.expert_weights
    sums = []

    for bank in banks:
        bank_state = getattr(state, bank.name, None)
        apply = partial(_call_bank, bank.module, bank.name, bank_state is not None)

        if choices is None:
            own = routing.expert_indices - bank.begin
            sums.append(
                step_bank_on_device(
                    *(bank.module, apply, own, tokens, weights, bank_state)
                )
            )
        else:
            chosen = {
                e - bank.begin: c
                for e, c in choices.items()
                if 0 <= e - bank.begin < bank.size
            }
            sums.append(
                step_bank(bank.module, apply, chosen, tokens, weights, bank_state)
            )

    # (N,M) -> (N,1,M)
    return torch.stack(sums).sum(dim=0).unsqueeze(1).to(seqs.dtype)


def can_step_units(banks: Sequence[Bank], seqs: Tensor) -> bool:
    """Tell whether :func:`step_units` can be asked for.

    :param banks: The banks.
    :param seqs: *Shape:* ``(N,1,M)``.

    :returns: Whether all of them have kernels, see
        :func:`~moxe_plugin.nn.stepping_block.steps_in_triton`.
    """
    return all(bank.name != "ffn" and bank.module.steps_units(seqs) for bank in banks)


def step_units(
    banks: Sequence[Bank], seqs: Tensor, routing: Routing, state: ExpertsState
) -> Tensor:
    """Apply the experts that tokens chose, in Triton kernels.

    :param banks: The banks.
    :param seqs: *Shape:* ``(N,1,M)``.
    :param routing: Where the tokens go.
    :param state: Becomes that after the tokens.

    :returns: The weighted sums, as ``seqs``.
    """
    # Imports Triton, which not every machine has.
    from moxe_plugin.nn.triton.block_steps import sum_experts
    from moxe_plugin.nn.triton.step_units import StepUnits

    # (N,1,M) -> (N,M), and (N,K) -> (U)
    tokens, experts = seqs.squeeze(1).contiguous(), routing.expert_indices.flatten()
    top_k = routing.expert_indices.size(1)
    outputs = tokens.new_empty(experts.size(0), tokens.size(1), dtype=torch.float32)

    for bank in banks:
        units = StepUnits(tokens, experts, bank.begin, bank.size, top_k)
        bank.module.step_units(units, getattr(state, bank.name), outputs)

    summed = torch.empty_like(tokens)
    num_experts = sum(bank.size for bank in banks)
    sum_experts(outputs, routing.expert_weights, experts, num_experts, summed)

    return summed.unsqueeze(1)


def _call_bank(
    bank: Module,
    name: str,
    return_state: bool,
    seqs: Tensor,
    state: Any,
    params: Mapping[str, Tensor],
) -> tuple[Tensor, Any]:
    if name == "ffn":
        return functional_call(bank, dict(params), (seqs,)), None

    options = {"return_state": return_state}

    output: tuple[Tensor, Any] = functional_call(
        bank, dict(params), (seqs, None, state), options
    )

    return output
