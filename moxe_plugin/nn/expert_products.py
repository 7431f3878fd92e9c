"""Products of the rows of experts by torch alone, for GPUs.

No gradients here. A product takes a GPU some microseconds, and each view that the host
makes for it takes as long: all views of a tensor are made by one call, and results are
written where they belong. cuBLAS takes any matrix of which one stride is 1, also for
results; with others torch copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def expert_products(
    rows: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    ends: Tensor | None = None,
) -> Tensor:
    """Multiply rows by their expert's weight.

    Experts are multiplied by one kernel of torch's if it is possible, else one by one:
    on GPUs of compute capability 9 or more (H100), in bfloat16, with widths that are
    multiples of 8, and where ``ends`` is given. On an H200 with four experts of 4,096
    rows it takes the GPU as long, and the host 24 instead of 64 us.

    :param rows: Sorted by expert. *Shape:* ``(C,in)``.
    :param weight: *Shape:* ``(E,in,out)``.
    :param counts: The number of rows of each expert, C in all.
    :param ends: Where the rows of each expert end, int32, on the rows' device. *Shape:*
        ``(E)``.

    :returns: *Shape:* ``(C,out)``.
    """
    if len(counts) == 1:
        return torch.mm(rows, weight[0])

    if _takes_one_kernel(rows, weight, ends):
        return torch._grouped_mm(rows, weight, offs=ends)

    out = rows.new_empty(rows.size(0), weight.size(2))
    parts = zip(
        counts,
        rows.split_with_sizes(counts),
        weight.unbind(),
        out.split_with_sizes(counts),
        strict=True,
    )
    for count, x, w, y in parts:
        if count > 0:
            torch.mm(x, w, out=y)

    return out


def add_expert_products(
    residual: Tensor,
    rows: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    ends: Tensor | None = None,
) -> Tensor:
    """Add :func:`expert_products` to other rows.

    :param residual: Of the type of ``rows``, or a wider one. *Shape:* ``(C,out)``.
    :param rows: As there, like what follows.
    :param weight: As there.
    :param counts: As there.
    :param ends: As there.

    :returns: A new tensor, of the type of ``residual``. *Shape:* ``(C,out)``.
    """
    if residual.dtype != rows.dtype:
        return residual + expert_products(rows, weight, counts, ends)

    if len(counts) == 1:
        return torch.addmm(residual, rows, weight[0])

    if _takes_one_kernel(rows, weight, ends):
        return expert_products(rows, weight, counts, ends).add_(residual)

    out = torch.empty_like(residual)
    parts = zip(
        counts,
        residual.split_with_sizes(counts),
        rows.split_with_sizes(counts),
        weight.unbind(),
        out.split_with_sizes(counts),
        strict=True,
    )
    for count, x, y, w, z in parts:
        if count > 0:
            torch.addmm(x, y, w, out=z)

    return out


def expert_outer_products(
    lhs: Tensor, rhs: Tensor, counts: Sequence[int], ends: Tensor | None = None
) -> Tensor:
    """Compute each expert's ``lhs^T rhs``.

    :param lhs: Sorted by expert. *Shape:* ``(C,in)``.
    :param rhs: Sorted by expert. *Shape:* ``(C,out)``.
    :param counts: The number of rows of each expert, C in all.
    :param ends: As for :func:`expert_products`.

    :returns: 0 for an expert without a row. *Shape:* ``(E,in,out)``.
    """
    if len(counts) == 1:
        return torch.mm(lhs.t(), rhs).unsqueeze(0)

    if _takes_one_kernel(lhs, rhs, ends):
        return torch._grouped_mm(lhs.t(), rhs, offs=ends)

    out = lhs.new_empty(len(counts), lhs.size(1), rhs.size(1))
    parts = zip(
        lhs.t().split_with_sizes(counts, 1),
        rhs.split_with_sizes(counts),
        out.unbind(),
        strict=True,
    )
    for x, y, z in parts:
        # Of no rows, torch makes 0.
        torch.mm(x, y, out=z)

    return out


def head_products(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply rows by their expert's weights, one for each group of channels.

    :param rows: Sorted by expert. *Shape:* ``(C,G*in)``.
    :param weight: *Shape:* ``(E,G,in,out)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,G*out)``.
    """
    _, num_groups, num_in, num_out = weight.shape
    num_rows = rows.size(0)
    out = rows.new_empty(num_rows, num_groups * num_out)
    # (C,G*D) -> (G,C,D)
    lhs = rows.view(num_rows, num_groups, num_in).transpose(0, 1)
    result = out.view(num_rows, num_groups, num_out).transpose(0, 1)

    parts = zip(
        counts,
        lhs.split_with_sizes(counts, 1),
        weight.unbind(),
        result.split_with_sizes(counts, 1),
        strict=True,
    )
    for count, x, w, y in parts:
        if count > 0:
            torch.bmm(x, w, out=y)

    return out


def head_outer_products(
    lhs: Tensor, rhs: Tensor, out: Tensor, counts: Sequence[int]
) -> None:
    """Compute each expert's ``lhs^T rhs``, for each group of channels.

    :param lhs: Sorted by expert. *Shape:* ``(C,G*in)``.
    :param rhs: Sorted by expert. *Shape:* ``(C,G*out)``.
    :param out: Where the results go, 0 for an expert without a row; its last stride is
        1. *Shape:* ``(E,G,in,out)``.
    :param counts: The number of rows of each expert, C in all.
    """
    _, num_groups, num_in, num_out = out.shape
    num_rows = lhs.size(0)
    # (C,G*in) -> (G,in,C)
    columns = lhs.view(num_rows, num_groups, num_in).permute(1, 2, 0)
    others = rhs.view(num_rows, num_groups, num_out).transpose(0, 1)

    parts = zip(
        columns.split_with_sizes(counts, 2),
        others.split_with_sizes(counts, 1),
        out.unbind(),
        strict=True,
    )
    for x, y, z in parts:
        torch.bmm(x, y, out=z)


def _takes_one_kernel(lhs: Tensor, rhs: Tensor, ends: Tensor | None) -> bool:
    # It wants strides that are multiples of 16 bytes.
    return (
        ends is not None
        and lhs.dtype == torch.bfloat16
        and lhs.stride(1) == 1
        and all(size % 8 == 0 for size in (lhs.stride(0), *rhs.shape[1:]))
        and _has_one_kernel(lhs.device)
    )


@lru_cache(maxsize=16)
def _has_one_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
