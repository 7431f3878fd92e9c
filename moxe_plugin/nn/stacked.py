"""Parameters and products for one block, or for a stack of E blocks of one kind.

With ``num_experts=None`` parameters are ``(…)`` and sequences ``(N,S,M)``; with
``num_experts=E`` they are ``(E,…)`` and ``(E,N,S,M)``, and all E run batched.
Weights of projections are stored ``([E,]in,out)``. Sequences of experts may also come
without padding, as rows ``(C,M)`` that are sorted by expert, with the ``counts`` of
each expert's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from moxe_plugin.nn.grouped import (
    grouped_head_product,
    grouped_head_products,
    grouped_product,
    spread,
)
from moxe_plugin.nn.products import matmul, runs_native


def expert_parameter(num_experts: int | None, *shape: int) -> Parameter:
    """Create an uninitialised parameter, stacked if there are experts.

    :param num_experts: The size of the leading dimension; ``None`` for no such one.
    :param shape: The shape for one expert.

    :returns: The parameter. *Shape:* ``([E,]…)``.
    """
    return Parameter(
        torch.empty(shape if num_experts is None else (num_experts, *shape))
    )


def project(
    seqs: Tensor, weight: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """Multiply every position by a weight, as one product per expert.

    :param seqs: *Shape:* ``([E,]N,S,in)``.
    :param weight: *Shape:* ``([E,]in,out)``.
    :param counts: The rows of each expert, if ``seqs`` are rows ``(C,in)``.

    :returns: *Shape:* ``([E,]N,S,out)``, or ``(C,out)``.
    """
    if counts is not None:
        return grouped_product(seqs, weight, counts)

    product = matmul(seqs.flatten(-3, -2), weight)

    return torch.unflatten(product, -2, seqs.shape[-3:-1])


def project_in_halves(
    seqs: Tensor, weight: Tensor, counts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply every position by a weight, and return the halves of the results.

    Where products are C++, each half is a tensor of its own, and nothing has to join
    their gradients.

    :param seqs: As for :func:`project`.
    :param weight: *Shape:* ``([E,]in,2*out)``.
    :param counts: As for :func:`project`.

    :returns: *Shape:* ``([E,]N,S,out)`` each, or ``(C,out)``.
    """
    if not runs_native(seqs, weight):
        first, second = project(seqs, weight, counts).chunk(2, dim=-1)

        return first, second

    # ([E,]in,2*out) -> (E,1,in,2,out)
    halves = weight.view(-1, 1, weight.size(-2), 2, weight.size(-1) // 2)
    flat = seqs.flatten(0, -2)
    if counts is None:
        counts = equal_counts(flat, halves)

    first, second = grouped_head_products([flat, flat], halves, counts)
    shape = *seqs.shape[:-1], halves.size(-1)

    return first.view(shape), second.view(shape)


def project_head_wise(
    seqs: Tensor, weight: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """Multiply each group of channels by its own square weight.

    :param seqs: *Shape:* ``([E,]N,S,G*in)``.
    :param weight: *Shape:* ``([E,]G,in,out)``.
    :param counts: The rows of each expert, if ``seqs`` are rows ``(C,G*in)``.

    :returns: *Shape:* ``([E,]N,S,G*out)``, or ``(C,G*out)``.
    """
    if counts is not None:
        return grouped_head_product(seqs, weight, counts)

    if weight.ndim == 3:
        weight = weight.unsqueeze(0)

    flat = seqs.flatten(0, -2)
    product = grouped_head_product(flat, weight, equal_counts(flat, weight))

    return product.view(*seqs.shape[:-1], product.size(-1))


def equal_counts(flat: Tensor, weight: Tensor) -> list[int]:
    """Count the rows of each expert where all have equally many.

    :param flat: All positions of all experts. *Shape:* ``(C,M)``.
    :param weight: *Shape:* ``(E,…)``.

    :returns: ``C / E``, E times.
    """
    return [flat.size(0) // weight.size(0)] * weight.size(0)


def per_channel(
    vector: Tensor, seqs: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """View a per-channel parameter so that it broadcasts against sequences.

    :param vector: *Shape:* ``([E,]M)``.
    :param seqs: *Shape:* ``([E,]…,M)``.
    :param counts: The rows of each expert, if ``seqs`` are rows ``(C,M)``.

    :returns: *Shape:* ``(M)``, ``(E,1,…,1,M)`` or ``(C,M)``.
    """
    if counts is not None:
        return spread(vector, counts)

    if vector.ndim == 1:
        return vector

    return vector.view(vector.size(0), *[1] * (seqs.ndim - 2), vector.size(1))
