"""Experts of a layer spread over processes: ``docs/expert_parallelism.md``.

A *row* is one token on its way to one expert. What a process sends it orders by
(destination, expert, sequence, position), hence an expert gets each sequence's tokens
in their order, and answers row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
)
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.dispatch import combine, dispatch, plan_dispatch
from moxe_plugin.nn.expert_layouts import Layout
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.routing import Routing


class ExpertParallelExperts(SparseExperts):
    """Sparse experts of which each process of a group has its share.

    Of E experts of a bank, process ``r`` of R has the ``r``-th block of ``E / R``. The
    routing counts all experts as :class:`SparseExperts` does: first all mLSTM experts,
    then all sLSTM experts. Each process calls it with sequences of its own, as many
    tokens as it likes; all call it equally often, in the same order.

    A recurrent expert recurs over the tokens of each sequence that are routed to it, as
    with ``expert_state="subsequence"``. Its states stay in its process: a state that is
    returned is of this process's experts and of the sequences of *all* processes, and
    goes with the next chunk of the same sequences.

    Gradients of the experts are those of the sum of all processes' losses. They need no
    reduction, and must be kept from one.

    :param group: The processes.
    :param mlstm: This process's share of the mLSTM experts.
    :param slstm: This process's share of the sLSTM experts.
    :param ffn: This process's share of feed-forward experts, which stand alone.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        mlstm: Module | None = None,
        slstm: Module | None = None,
        ffn: Module | None = None,
    ) -> None:
        banks = [bank for bank in (mlstm, slstm, ffn) if bank is not None]

        num_local_experts = sum(next(b.parameters()).size(0) for b in banks)

        super().__init__(num_local_experts, mlstm=mlstm, slstm=slstm, ffn=ffn)

        self.group = group

        self._lay_out = self._lay_out_remotely

    @property
    @override
    def steps_on_device(self) -> bool:
        return False

    def _is_step(self, seqs: Tensor, seq_lens: Tensor | None) -> bool:  # noqa: ARG002  # as the base class has it
        # A process that got no token must take part all the same.
        return False

    def _trains_on_rows(self, seqs: Tensor) -> bool:  # noqa: ARG002  # as the base class has it
        # Tokens travel between processes in grids.
        return False

    def _runs_on_host_rows(self, seqs: Tensor, routing: Routing) -> bool:  # noqa: ARG002  # as the base class has it
        # As above
        return False

    def _lay_out_remotely(
        self,
        seqs: Tensor,
        routing: Routing,
        seq_lens: Tensor | None,
        bank_sizes: list[int],
    ) -> Layout:
        num_processes = self.group.size()

        token_mask = None
        if seq_lens is not None:
            # (S) < (N,1) -> (N,S)
            token_mask = (
                torch.arange(seqs.size(1), device=seqs.device) < seq_lens[:, None]
            )

        plan = plan_dispatch(
            routing.expert_indices.view(*seqs.shape[:2], -1),
            token_mask,
            [size * num_processes for size in bank_sizes],
        )

        grids = dispatch(seqs.flatten(0, 1), plan)

        trip = _plan_trip(plan.grid_lens, plan.is_filled, bank_sizes, self.group)

        # (E,N,L,M) each -> (G,M) -> rows
        sent = torch.cat([g.flatten(0, 2) for g in grids]).index_select(
            0, trip.slot_of_sent
        )

        received = all_to_all_single_autograd(
            sent, trip.num_received, trip.num_sent, self.group
        )

        remote_grids = _place(received, trip.slot_of_received, trip.grid_shapes)

        def sum_outputs(outputs: list[Tensor]) -> Tensor:
            rows = torch.cat([o.flatten(0, 2) for o in outputs]).index_select(
                0, trip.slot_of_received
            )

            answers = all_to_all_single_autograd(
                rows, trip.num_sent, trip.num_received, self.group
            )

            own_grids = _place(answers, trip.slot_of_sent, plan.grid_shapes)

            return combine(own_grids, routing.expert_weights, plan)

        return Layout(remote_grids, [*trip.grid_lens], sum_outputs, has_state=True)


class _Trip(NamedTuple):
    # The slots, in this process's own grids, of the rows that it sends, in order.
    slot_of_sent: Tensor
    # The slots of the rows that it gets, in the grids of its experts.
    slot_of_received: Tensor
    # Rows for and from each process.
    num_sent: list[int]
    num_received: list[int]
    # The grids of its experts: the sequences of process 0, of process 1 and so on.
    grid_shapes: list[tuple[int, int, int]]
    grid_lens: list[Tensor]


def _plan_trip(
    own_lens: Sequence[Tensor],
    is_filled: Tensor,
    bank_sizes: Sequence[int],
    group: ProcessGroup,
) -> _Trip:
    num_processes, num_experts = group.size(), sum(bank_sizes)

    num_seqs = _gather_sizes(own_lens[0].size(1), own_lens[0].device, group)

    # (R*E,N) per bank -> (R,E,N), the banks' experts side by side
    lens = torch.cat([n.unflatten(0, (num_processes, -1)) for n in own_lens], dim=1)

    received_lens = all_to_all_single(
        lens.flatten(),
        [num_experts * n for n in num_seqs],
        [num_experts * lens.size(2)] * num_processes,
        group,
    )

    # (E,N) of each process -> (E,N of all)
    blocks = [
        block.view(num_experts, -1)
        for block in received_lens.split([num_experts * n for n in num_seqs])
    ]

    num_sent, num_received = (
        lens.sum(dim=(1, 2)).tolist(),
        [int(block.sum()) for block in blocks],
    )

    grid_lens = list(torch.cat(blocks, dim=1).split(list(bank_sizes)))

    # An expert without a token keeps a slot, so that it gets a (zero) gradient.
    grid_shapes = [(n.size(0), n.size(1), max(int(n.max()), 1)) for n in grid_lens]

    return _Trip(
        _order_sent(own_lens, is_filled, num_processes),
        _order_received(grid_lens, grid_shapes, num_seqs),
        num_sent,
        num_received,
        grid_shapes,
        grid_lens,
    )


def _gather_sizes(size: int, device: torch.device, group: ProcessGroup) -> list[int]:
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())
    ]

    dist.all_gather(sizes, torch.tensor([size], device=device), group)

    return [int(s) for s in sizes]


def _order_sent(
    own_lens: Sequence[Tensor], is_filled: Tensor, num_processes: int
) -> Tensor:
    # Filled slots come by (bank, expert, sequence, position) already.
    destinations = torch.cat(
        [
            torch.arange(num_processes, device=lens.device).repeat_interleave(
                lens.reshape(num_processes, -1).sum(dim=1)
            )
            for lens in own_lens
        ]
    )

    return is_filled.nonzero().squeeze(1)[destinations.argsort(stable=True)]


def _order_received(
    grid_lens: Sequence[Tensor],
    grid_shapes: Sequence[tuple[int, int, int]],
    num_seqs: Sequence[int],
) -> Tensor:
    device = grid_lens[0].device

    slots, sources, begin = [], [], 0

    source_of_seq = torch.arange(len(num_seqs), device=device).repeat_interleave(
        torch.tensor(num_seqs, device=device)
    )

    for lens, shape in zip(grid_lens, grid_shapes, strict=True):
        # (L) < (E,N,1) -> (E,N,L)
        is_filled = torch.arange(shape[2], device=device) < lens.unsqueeze(-1)

        slots.append(is_filled.flatten().nonzero().squeeze(1) + begin)
        sources.append(source_of_seq[:, None].expand(shape)[is_filled])

        begin += is_filled.numel()

    # Of each source's rows, too, those of a bank come by expert, sequence and position.
    return torch.cat(slots)[torch.cat(sources).argsort(stable=True)]


def _place(
    rows: Tensor, slots: Tensor, shapes: Sequence[tuple[int, int, int]]
) -> list[Tensor]:
    sizes = [e * n * length for e, n, length in shapes]

    # One to one, so that the gradient is a gather
    filled = rows.new_zeros(sum(sizes), rows.size(1)).index_copy(0, slots, rows)

    return [
        grid.view(*shape, -1)
        for grid, shape in zip(filled.split(sizes), shapes, strict=True)
    ]
