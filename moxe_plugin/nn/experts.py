"""Sparse experts: send tokens to experts, weigh and sum the outputs. MoxE eq. (9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.expert_device_steps import step_bank_on_device
from moxe_plugin.nn.expert_layouts import (
    LAYOUTS,
    ExpertStateKind,
    make_token_mask,
)
from moxe_plugin.nn.expert_steps import Choices, sort_choices, step_bank
from moxe_plugin.nn.ragged_dispatch import combine_rows, send_tokens
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.rows import find_rows, pack, unpack
from moxe_plugin.nn.states import take_state

if TYPE_CHECKING:
    from moxe_plugin.nn.mlstm_recurrence import MLSTMState
    from moxe_plugin.nn.slstm import SLSTMState


ExpertSteps: TypeAlias = Literal["auto", "host", "device"]
"""Who looks which experts the tokens of a step chose: the ``host``, which then computes
these only, or the ``device``, which the host needs not wait for; ``auto`` is ``host``
for tensors on a CPU. Both compute the same."""


class ExpertsState(NamedTuple):
    """The recurrent states of a layer's experts; tensors lead with ``(E,N)``."""

    mlstm: MLSTMState | None
    """The state of the mLSTM experts, if there are any."""

    slstm: SLSTMState | None
    """The state of the sLSTM experts, if there are any."""


class SparseExperts(Module):
    """Applies to each token its experts, and sums their weighted outputs.

    The experts of a kind are one *bank*, a module whose parameters lead with the number
    of its experts. First come the mLSTM experts, then the sLSTM experts; or all are
    feed-forward networks.

    The paper leaves open what an expert sees; ``expert_state`` chooses:

    - ``subsequence``: in each sequence an expert recurs over the tokens routed to it,
      in order; its state waits unchanged in between;
    - ``token``: as the authors' code; every token is a sequence by itself, experts have
      no memory;
    - ``dense``: every expert recurs over all tokens, and outputs of experts that were
      not chosen are dropped. The costly upper bound.

    :param num_experts: The number of experts.
    :param mlstm: The mLSTM experts, a :class:`~moxe_plugin.nn.mlstm.MLSTMBlock`.
    :param slstm: The sLSTM experts, a :class:`~moxe_plugin.nn.slstm.SLSTMBlock`.
    :param ffn: The feed-forward experts, a
        :class:`~moxe_plugin.nn.layers.GatedFeedForward`. They have no state; with
        ``expert_state="token"`` their batch has the least padding.
    :param expert_state: What an expert sees.
    :param steps: How one token of each sequence, without gradients, is computed.

    :raises ValueError: The banks do not have ``num_experts`` experts in all, or ``ffn``
        is not alone, or ``expert_state`` or ``steps`` is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        mlstm: Module | None = None,
        slstm: Module | None = None,
        ffn: Module | None = None,
        expert_state: ExpertStateKind = "subsequence",
        steps: ExpertSteps = "auto",
    ) -> None:
        super().__init__()

        if ffn is not None and (mlstm is not None or slstm is not None):
            raise ValueError("`ffn` must be None when `mlstm` or `slstm` is given.")

        banks = {"mlstm": mlstm, "slstm": slstm, "ffn": ffn}

        for name, bank in banks.items():
            self.register_module(name, bank)

        self.num_experts = num_experts

        self._bank_names = [name for name, bank in banks.items() if bank is not None]
        self._bank_sizes = [
            next(bank.parameters()).size(0)
            for bank in banks.values()
            if bank is not None
        ]

        if sum(self._bank_sizes) != num_experts:
            raise ValueError(
                f"`mlstm`, `slstm` and `ffn` must have `num_experts` ({num_experts}) "
                f"experts in all, but have {sum(self._bank_sizes)} instead."
            )

        if expert_state not in LAYOUTS:
            raise ValueError(
                f"`expert_state` must be one of {', '.join(LAYOUTS)}, but is "
                f"'{expert_state}' instead."
            )

        if steps not in get_args(ExpertSteps):
            raise ValueError(
                f"`steps` must be one of {', '.join(get_args(ExpertSteps))}, but is "
                f"'{steps}' instead."
            )

        self.steps = steps

        self._expert_state = expert_state
        self._lay_out = LAYOUTS[expert_state]

    @override
    def forward(
        self,
        seqs: Tensor,
        routing: Routing,
        seq_lens: Tensor | None = None,
        state: ExpertsState | None = None,
        *,
        return_state: bool = True,
        reuse_state: bool = False,
    ) -> tuple[Tensor, ExpertsState | None]:
        """Apply the experts.

        :param seqs: The output of the sequence mixer. *Shape:* ``(N,S,M)``.
        :param routing: Where the tokens go, ``T = N * S`` in row-major order.
        :param seq_lens: The lengths of right-padded sequences; all are full if
            ``None``. Padding goes to no expert. *Shape:* ``(N)``.
        :param state: The state after the previous chunk of the same sequences.
        :param return_state: Whether to return a state.
        :param reuse_state: Whether the tensors of ``state`` may become those of the
            state that is returned, which spares copies of all experts' memories.

        :returns: The sums, exactly 0 at padding, *Shape:* ``(N,S,M)``, and the state
            after the last token; ``None`` with ``expert_state="token"``, or if it is
            not wanted.
        """
        if self._is_step(seqs, seq_lens):
            step = self._plan_step(seqs, routing)

            if step is not None:
                step_state = None
                if return_state and self._expert_state == "subsequence":
                    step_state = self._prepare_state(seqs, state, reuse=reuse_state)

                return step(step_state), step_state

        if state is None and not return_state and self._trains_on_rows(seqs):
            return self._apply_to_rows(seqs, routing, seq_lens), None

        layout = self._lay_out(seqs, routing, seq_lens, self._bank_sizes)

        keeps_state = return_state and layout.has_state

        outputs: list[Tensor] = []
        states: dict[str, Any] = {"mlstm": None, "slstm": None}

        for name, grid, grid_lens in zip(
            self._bank_names, layout.grids, layout.grid_lens, strict=True
        ):
            bank = self.get_submodule(name)

            if name == "ffn":
                output = _feed_forward(bank, grid, grid_lens)
            else:
                output, states[name] = bank(
                    grid,
                    grid_lens,
                    None if state is None else getattr(state, name),
                    return_state=keeps_state,
                )

            outputs.append(output)

        # (T,M) -> (N,S,M)
        summed = layout.sum_outputs(outputs).view(seqs.shape).to(seqs.dtype)

        return summed, ExpertsState(**states) if keeps_state else None

    @property
    def steps_on_device(self) -> bool:
        """Whether a step on a GPU asks nothing of it, as a CUDA graph wants it."""
        return self._expert_state != "dense" and self.steps != "host"

    def _is_step(self, seqs: Tensor, seq_lens: Tensor | None) -> bool:
        # In training every parameter must get a gradient, also an idle expert's.
        return (
            seqs.size(1) == 1
            and seq_lens is None
            and self._expert_state != "dense"
            and not torch.is_grad_enabled()
        )

    def _trains_on_rows(self, seqs: Tensor) -> bool:
        return (
            self._expert_state == "subsequence"
            and "ffn" not in self._bank_names
            and all(self._bank(name).trains_on_rows(seqs) for name in self._bank_names)
        )

    def _apply_to_rows(
        self, seqs: Tensor, routing: Routing, seq_lens: Tensor | None
    ) -> Tensor:
        plan, banks = send_tokens(
            seqs.flatten(0, 1),
            routing.expert_indices.view(*seqs.shape[:2], -1),
            make_token_mask(seqs, seq_lens),
            self._bank_sizes,
        )
        outputs = [
            self._bank(name).apply_to_rows(flat, rows)
            for name, flat, rows in zip(
                self._bank_names, banks, plan.banks, strict=True
            )
        ]

        # (T,M) -> (N,S,M)
        return combine_rows(outputs, routing.expert_weights, plan, seqs.dtype).view(
            seqs.shape
        )

    def _bank(self, name: str) -> Any:
        return self.get_submodule(name)

    def _plan_step(
        self, seqs: Tensor, routing: Routing
    ) -> Callable[[ExpertsState | None], Tensor] | None:
        if self.steps == "device" or (self.steps == "auto" and not seqs.is_cpu):
            if self._steps_units(seqs):
                return partial(self._step_units, seqs, routing)

            return partial(self._step_banks, seqs, routing, None)

        choices = sort_choices(routing.expert_indices)

        # All experts at once are faster then.
        if len(choices) == self.num_experts:
            return None

        return partial(self._step_banks, seqs, routing, choices)

    def _step_banks(
        self,
        seqs: Tensor,
        routing: Routing,
        choices: Mapping[int, Choices] | None,
        state: ExpertsState | None,
    ) -> Tensor:
        tokens, weights = seqs.squeeze(1), routing.expert_weights
        sums = []

        for name, begin, size in self._list_banks():
            bank, bank_state = self._bank(name), getattr(state, name, None)
            apply = partial(_call_bank, bank, name, bank_state is not None)

            if choices is None:
                own = routing.expert_indices - begin
                sums.append(
                    step_bank_on_device(bank, apply, own, tokens, weights, bank_state)
                )
            else:
                chosen = {
                    e - begin: c for e, c in choices.items() if 0 <= e - begin < size
                }
                sums.append(step_bank(bank, apply, chosen, tokens, weights, bank_state))

        # (N,M) -> (N,1,M)
        return torch.stack(sums).sum(dim=0).unsqueeze(1).to(seqs.dtype)

    def _steps_units(self, seqs: Tensor) -> bool:
        return (
            self._expert_state == "subsequence"
            and "ffn" not in self._bank_names
            and all(self._bank(name).steps_units(seqs) for name in self._bank_names)
        )

    def _step_units(
        self, seqs: Tensor, routing: Routing, state: ExpertsState | None
    ) -> Tensor:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.block_steps import sum_experts
        from moxe_plugin.nn.triton.step_units import StepUnits

        if state is None:
            state = self._prepare_state(seqs, None, reuse=True)

        # (N,1,M) -> (N,M), and (N,K) -> (U)
        tokens, experts = seqs.squeeze(1).contiguous(), routing.expert_indices.flatten()
        outputs = tokens.new_empty(experts.size(0), tokens.size(1), dtype=torch.float32)

        for name, begin, size in self._list_banks():
            units = StepUnits(
                tokens, experts, begin, size, experts.size(0) // tokens.size(0)
            )
            self._bank(name).step_units(units, getattr(state, name), outputs)

        summed = torch.empty_like(tokens)
        sum_experts(outputs, routing.expert_weights, experts, self.num_experts, summed)

        return summed.unsqueeze(1)

    def _list_banks(self) -> Iterator[tuple[str, int, int]]:
        # The name, the number of the first expert, how many there are
        begins = accumulate(self._bank_sizes, initial=0)

        return zip(self._bank_names, begins, self._bank_sizes, strict=False)

    def _prepare_state(
        self, seqs: Tensor, state: ExpertsState | None, *, reuse: bool
    ) -> ExpertsState:
        def prepare(name: str) -> Any:
            bank_state = None if state is None else getattr(state, name)

            if bank_state is None:
                return self._bank(name).initial_state(seqs.size(0), seqs.device)

            return take_state(bank_state, reuse=reuse)

        return ExpertsState(
            *(
                prepare(name) if name in self._bank_names else None
                for name in ExpertsState._fields
            )
        )


def _feed_forward(bank: Module, grid: Tensor, grid_lens: Tensor | None) -> Tensor:
    if grid_lens is None:
        output: Tensor = bank(grid)

        return output

    rows = find_rows(grid_lens, grid.size(2))

    return unpack(bank(pack(grid, rows), rows.counts), rows)


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
