"""One token of each sequence through its experts, without touching the others.

Reading a long text keeps all experts busy, so a bank computes them as one batched
product. A step of a generation has few tokens: there the batched product would read the
parameters of every expert to use those of a few, and reading them is what a step costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module


class Choices(NamedTuple):
    """The tokens that chose an expert."""

    rows: list[int]
    """Their sequences."""

    places: list[int]
    """At which of its K places each of them holds the expert."""


class BankFunction(Protocol):
    """Applies some experts of a bank; what a bank's ``forward`` does for all."""

    def __call__(
        self, seqs: Tensor, state: Any, params: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """Apply the experts.

        :param seqs: *Shape:* ``(E,N,S,M)``.
        :param state: Their state, or ``None``.
        :param params: The parameters of the experts in place of the bank's own.

        :returns: The outputs, as ``seqs``, and the state after them, or ``None``.
        """


def sort_choices(expert_indices: Tensor) -> dict[int, Choices]:
    """Sort the choices of a step by expert.

    :param expert_indices: The distinct experts of each token; -1 at places that it
        leaves empty. *Shape:* ``(N,K)``.

    :returns: By expert, in ascending order, the tokens that chose it.
    """
    choices: dict[int, Choices] = defaultdict(lambda: Choices([], []))

    for row, experts in enumerate(expert_indices.tolist()):
        for place, expert in enumerate(experts):
            if expert >= 0:
                choices[expert].rows.append(row)
                choices[expert].places.append(place)

    return dict(sorted(choices.items()))


def step_bank(
    bank: Module,
    apply: BankFunction,
    choices: Mapping[int, Choices],
    tokens: Tensor,
    expert_weights: Tensor,
    state: Any,
) -> Tensor:
    """Apply some experts of a bank to one token of each sequence: MoxE eq. (9).

    :param bank: The bank; its parameters lead with its number of experts E.
    :param apply: Applies it.
    :param choices: The experts, by their number in the bank, and their tokens.
    :param tokens: *Shape:* ``(N,M)``.
    :param expert_weights: The weights of the experts. *Shape:* ``(N,K)``.
    :param state: The state of the bank's experts, which becomes that after the token;
        ``None`` for experts without memory. *Shape:* ``(E,N,…)`` each.

    :returns: The weighted sums over the experts, 0 for tokens that chose none, in the
        precision of ``expert_weights`` at least. *Shape:* ``(N,M)``.
    """
    sums = torch.zeros_like(
        tokens, dtype=torch.promote_types(tokens.dtype, expert_weights.dtype)
    )

    for expert, (rows, places) in choices.items():
        row_ids, place_ids = torch.tensor([rows, places], device=tokens.device)

        # Views: the parameters of other experts are not read.
        params = {n: p[expert : expert + 1] for n, p in bank.named_parameters()}

        before = None
        if state is not None:
            before = type(state)(*(x[expert, row_ids].unsqueeze(0) for x in state))

        # (N,M) -> (1,R,1,M)
        output, after = apply(tokens[row_ids][None, :, None], before, params)

        weights = expert_weights[row_ids, place_ids].unsqueeze(-1)
        sums[row_ids] += output.flatten(0, 2) * weights

        if state is not None:
            for whole, part in zip(state, after, strict=True):
                whole[expert, row_ids] = part[0].to(whole.dtype)

    return sums
