"""Count the parameters that can receive a gradient at all, by backward passes."""

from __future__ import annotations

from typing import Final

import torch
from fairseq2.nn import BatchLayout, StandardEmbedding
from torch import Tensor, nn

from moxe_plugin.models.clm import AuxLossCausalLM

_NUM_SEQS: Final = 2

_SEQ_LEN: Final = 32
"""Long enough for an expert to be sent several tokens of a sequence."""

_NOISE: Final = 0.03
"""By how much, at most, a parameter moves before a batch: none stays at an initial
zero, and none becomes large."""

_MIN_GRAD: Final = 1e-14
"""What counts as a gradient, over the largest one of all passes. In float64, terms
that cancel leave about 1e-17 of it; what else there is rarely falls below 1e-9."""

_MAX_BATCHES: Final = 32


def count_effective_parameters(model: AuxLossCausalLM) -> int:
    """Count the elements of parameters that can receive a gradient.

    Measured on batches of random tokens, with the training loss, until all have had a
    gradient or a batch adds no element to the union. All parameters move at random
    before each batch: a gradient that is 0 all the same is so at any value of the
    parameters, and not because of an initial value, or of a router that would never
    choose some expert.

    A table of embeddings is measured at the tokens of the batches, and counted as if
    every token had been in one. The padding token, if there is one, always is.

    :param model: The model. Its parameters and what they require are changed.

    :returns: The number of elements.

    :raises ValueError: A parameter is not float64, in which alone nothing that cancels
        can be taken for a gradient.
    :raises RuntimeError: The union still grows after 32 batches.
    """
    if any(p.dtype != torch.float64 for p in model.parameters()):
        raise ValueError("`model` must have parameters of type float64 only.")

    model.train()

    embed, pad_idx = _find_embedding(model)

    effective = {
        name: torch.zeros_like(p, dtype=torch.bool, requires_grad=False)
        for name, p in model.named_parameters()
    }
    is_seen = torch.zeros(embed.size(0), dtype=torch.bool)
    max_grad = 0.0

    for _ in range(_MAX_BATCHES):
        token_ids = _draw_tokens(embed.size(0), pad_idx)
        is_seen[token_ids[:, :-1]] = True

        _compute_gradients(model, token_ids)

        max_grad = max(max_grad, _find_max_gradient(model))
        grown = _mark_gradients(model, effective, _MIN_GRAD * max_grad)

        for name, parameter in model.named_parameters():
            if parameter is embed:
                _extend_to_unseen(effective[name], is_seen, pad_idx)
                # That a token was not seen before is no news.
                grown.discard(name)

            # Has nothing left to show: spares most of the next pass.
            parameter.requires_grad_(not bool(effective[name].all()))

        if not grown or not any(p.requires_grad for p in model.parameters()):
            return sum(int(mask.sum()) for mask in effective.values())

    raise RuntimeError(
        f"After {_MAX_BATCHES} batches more gradients still appear, in "
        f"{', '.join(sorted(grown))}."
    )


def _find_embedding(model: nn.Module) -> tuple[Tensor, int | None]:
    for module in model.modules():
        match module:
            case StandardEmbedding():
                return module.weight, module.pad_idx
            case nn.Embedding():
                return module.weight, module.padding_idx

    raise ValueError("`model` must have a table of embeddings.")


def _draw_tokens(vocab_size: int, pad_idx: int | None) -> Tensor:
    token_ids = torch.randint(vocab_size, (_NUM_SEQS, _SEQ_LEN + 1))

    if pad_idx is not None:
        token_ids[0, 0] = pad_idx

    return token_ids


def _compute_gradients(model: AuxLossCausalLM, token_ids: Tensor) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            # Drawn in float32, which is faster; any values would do.
            noise = torch.empty(parameter.shape).uniform_(-_NOISE, _NOISE)
            parameter.add_(noise)

    model.zero_grad()

    seqs, targets = token_ids[:, :-1], token_ids[:, 1:]

    model(seqs, BatchLayout.of(seqs), targets, reduction="mean").backward()


def _find_max_gradient(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]

    return max(float(torch.stack(g.aminmax()).abs().max()) for g in grads)


def _mark_gradients(
    model: nn.Module, effective: dict[str, Tensor], min_grad: float
) -> set[str]:
    grown = set()

    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue

        mask = effective[name]
        num_before = mask.sum()

        mask |= parameter.grad.abs_() > min_grad

        if mask.sum() > num_before:
            grown.add(name)

    return grown


def _extend_to_unseen(mask: Tensor, is_seen: Tensor, pad_idx: int | None) -> None:
    is_measured = is_seen.clone()
    if pad_idx is not None:
        is_measured[pad_idx] = False

    # (R,M) -> (M)
    mask[~is_seen] |= mask[is_measured].all(dim=0)
