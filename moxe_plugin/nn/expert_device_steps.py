"""One token of each sequence through its experts, without asking which they are.

To learn which experts tokens chose, the host would have to wait for the device that
chose them, and a CUDA graph, which is launched as a whole, has no host to ask. Here all
shapes follow from the number of tokens alone.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module

from moxe_plugin.nn.expert_steps import BankFunction

_PARAM_PASSES: Final = 3
"""How often a copy of parameters is moved: read, written, and read to be used."""

_MEMORY_PASSES: Final = 6
"""How often a step of a cell moves a memory, about: torch's operations one by one, and
the copies out of the state and back."""


def step_bank_on_device(
    bank: Module,
    apply: BankFunction,
    expert_indices: Tensor,
    tokens: Tensor,
    expert_weights: Tensor,
    state: Any,
) -> Tensor:
    """Apply the chosen experts of a bank to one token of each sequence: MoxE eq. (9).

    Either as many experts as a token chooses are copied for each token, with their
    memories of its sequence, or all experts read all tokens and what nobody asked for
    is dropped: whichever moves less. It is the former where experts are many.

    :param bank: The bank; its parameters lead with its number of experts E.
    :param apply: Applies it.
    :param expert_indices: The distinct experts of each token, by their number in the
        bank; another number is that of an expert elsewhere, or of none. *Shape:*
        ``(N,K)``.
    :param tokens: *Shape:* ``(N,M)``.
    :param expert_weights: The weights of the experts. *Shape:* ``(N,K)``.
    :param state: The state of the bank's experts, which becomes that after the token;
        ``None`` for experts without memory. *Shape:* ``(E,N,…)`` each.

    :returns: The weighted sums over the experts, 0 for tokens that chose none, in the
        precision of ``expert_weights`` at least. *Shape:* ``(N,M)``.
    """
    if tokens.size(0) == 0:
        return torch.zeros_like(
            tokens, dtype=torch.promote_types(tokens.dtype, expert_weights.dtype)
        )

    num_experts = next(bank.parameters()).size(0)

    # (N,K) -> (N,E); experts elsewhere are one more at the end.
    is_here = (expert_indices >= 0) & (expert_indices < num_experts)
    columns = torch.where(is_here, expert_indices, num_experts)

    nothing = expert_weights.new_zeros(tokens.size(0), num_experts + 1)
    weights = nothing.scatter(1, columns, expert_weights)[:, :-1]
    is_chosen = nothing.bool().scatter(1, columns, value=True)[:, :-1]

    num_copies = expert_indices.size(1)

    if _copies_less(bank, num_copies, tokens.size(0), state):
        return _step_copies(bank, apply, num_copies, tokens, weights, is_chosen, state)

    return _step_all(bank, apply, tokens, weights, is_chosen, state)


def _copies_less(bank: Module, num_copies: int, num_seqs: int, state: Any) -> bool:
    num_experts = next(bank.parameters()).size(0)

    # Bytes of an expert, and of its memories of all sequences
    params = sum(p.nbytes for p in bank.parameters()) / num_experts
    memories = sum(x.nbytes for x in state or ()) / num_experts * _MEMORY_PASSES

    copied = num_copies * (num_seqs * _PARAM_PASSES * params + memories)

    return num_copies < num_experts and copied < num_experts * (params + memories)


def _step_copies(
    bank: Module,
    apply: BankFunction,
    num_copies: int,
    tokens: Tensor,
    weights: Tensor,
    is_chosen: Tensor,
    state: Any,
) -> Tensor:
    # The experts that a token chose come first, then any others: all are distinct, so
    # that no memory is written twice. (N,E) -> (N,K)
    _, experts = is_chosen.byte().topk(num_copies, dim=1)
    weights, is_chosen = weights.gather(1, experts), is_chosen.gather(1, experts)

    # Each copy is as an expert with one sequence.
    experts = experts.flatten()
    rows = torch.arange(tokens.size(0), device=tokens.device)
    rows = rows.repeat_interleave(num_copies)

    params = {n: p.index_select(0, experts) for n, p in bank.named_parameters()}

    before = None
    if state is not None:
        before = type(state)(*(x[experts, rows].unsqueeze(1) for x in state))

    # (N,M) -> (N*K,1,1,M)
    output, after = apply(tokens[rows][:, None, None], before, params)

    if before is not None:
        for whole, old, new in zip(state, before, after, strict=True):
            kept = _keep_unless(is_chosen.view(-1, 1), new.to(old.dtype), old)
            whole[experts, rows] = kept.squeeze(1)

    return _weigh(output.view(*weights.shape, -1), weights, is_chosen)


def _step_all(
    bank: Module,
    apply: BankFunction,
    tokens: Tensor,
    weights: Tensor,
    is_chosen: Tensor,
    state: Any,
) -> Tensor:
    params = dict(bank.named_parameters())

    # (N,M) -> (E,N,1,M)
    seqs = tokens[None, :, None].expand(weights.size(1), -1, -1, -1)
    output, after = apply(seqs, state, params)

    if state is not None:
        for whole, new in zip(state, after, strict=True):
            whole.copy_(_keep_unless(is_chosen.T, new.to(whole.dtype), whole))

    return _weigh(output.squeeze(2).transpose(0, 1), weights, is_chosen)


def _keep_unless(is_chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    # (E,N) -> (E,N,1,…)
    is_chosen = is_chosen.view(*is_chosen.shape, *[1] * (new.ndim - 2))

    return torch.where(is_chosen, new, old)


def _weigh(outputs: Tensor, weights: Tensor, is_chosen: Tensor) -> Tensor:
    # (N,K,M) -> (N,M); what was not chosen does not count, whatever it is.
    weighted = outputs * weights.unsqueeze(-1)

    return torch.where(is_chosen.unsqueeze(-1), weighted, 0.0).sum(dim=1)
