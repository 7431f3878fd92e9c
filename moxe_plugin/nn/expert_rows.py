"""Experts on the rows of their tokens, without padding, where no memory is kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moxe_plugin.nn import host_dispatch, ragged_dispatch
from moxe_plugin.nn.expert_layouts import make_token_mask
from moxe_plugin.nn.expert_states import Bank
from moxe_plugin.nn.native.library import is_readable
from moxe_plugin.nn.passes import runs_on_host_rows
from moxe_plugin.nn.routing import Routing


def can_train_on_rows(banks: Sequence[Bank], seqs: Tensor) -> bool:
    """Tell whether :func:`train_on_rows` can be asked for.

    :param banks: The banks.
    :param seqs: What they read. *Shape:* ``(N,S,M)``.

    :returns: Whether all of them may be Triton kernels on ragged rows.
    """
    return all(
        bank.name != "ffn" and bank.module.trains_on_rows(seqs) for bank in banks
    )


def train_on_rows(
    banks: Sequence[Bank], seqs: Tensor, routing: Routing, seq_lens: Tensor | None
) -> Tensor:
    """Apply experts to the rows of their tokens, in Triton kernels.

    :param banks: The banks.
    :param seqs: *Shape:* ``(N,S,M)``.
    :param routing: Where the tokens go.
    :param seq_lens: The lengths; all are full if ``None``. *Shape:* ``(N)``.

    :returns: The weighted sums. *Shape:* ``(N,S,M)``.
    """
    plan, inputs = ragged_dispatch.send_tokens(
        seqs.flatten(0, 1),
        routing.expert_indices.view(*seqs.shape[:2], -1),
        make_token_mask(seqs, seq_lens),
        [bank.size for bank in banks],
    )
    outputs = [
        bank.module.apply_to_rows(flat, rows)
        for bank, flat, rows in zip(banks, inputs, plan.banks, strict=True)
    ]

    # (T,M) -> (N,S,M)
    return ragged_dispatch.combine_rows(
        outputs, routing.expert_weights, plan, seqs.dtype
    ).view(seqs.shape)


def can_run_on_host_rows(banks: Sequence[Bank], seqs: Tensor, routing: Routing) -> bool:
    """Tell whether :func:`run_on_host_rows` can be asked for.

    :param banks: The banks.
    :param seqs: What they read. *Shape:* ``(N,S,M)``.
    :param routing: Where the tokens go.

    :returns: Whether all of them :func:`~moxe_plugin.nn.passes.runs_on_host_rows`, and
        have plain parameters.
    """
    return all(
        bank.name != "ffn"
        and runs_on_host_rows(bank.module.backend, seqs, routing.expert_weights)
        # What shards or wraps them wants to see the module called.
        and all(is_readable(x) for x in bank.module.parameters())
        for bank in banks
    )


def run_on_host_rows(
    banks: Sequence[Bank], seqs: Tensor, routing: Routing, seq_lens: Tensor | None
) -> Tensor:
    """Apply experts to the rows of their tokens, on a CPU.

    Hooks of the banks themselves do not run: not their ``forward`` is called.

    :param banks: The banks.
    :param seqs: *Shape:* ``(N,S,M)``.
    :param routing: Where the tokens go.
    :param seq_lens: The lengths; all are full if ``None``. *Shape:* ``(N)``.

    :returns: The weighted sums. *Shape:* ``(N,S,M)``.
    """
    plan = host_dispatch.plan_rows(
        routing.expert_indices.view(*seqs.shape[:2], -1),
        make_token_mask(seqs, seq_lens),
        [bank.size for bank in banks],
    )
    inputs = host_dispatch.send_tokens(seqs.flatten(0, 1), plan)
    outputs = [
        bank.module.apply_to_host_rows(flat, rows)
        for bank, flat, rows in zip(banks, inputs, plan.banks, strict=True)
    ]

    # (T,M) -> (N,S,M)
    return host_dispatch.combine_rows(outputs, routing.expert_weights, plan).view(
        seqs.shape
    )
