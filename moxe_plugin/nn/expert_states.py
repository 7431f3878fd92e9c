"""The banks of a layer's experts, and their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from moxe_plugin.nn.states import take_state

if TYPE_CHECKING:
    from moxe_plugin.nn.mlstm_recurrence import MLSTMState
    from moxe_plugin.nn.slstm_parameters import SLSTMState


class ExpertsState(NamedTuple):
    """The recurrent states of a layer's experts; tensors lead with ``(E,N)``."""

    mlstm: MLSTMState | None
    """The state of the mLSTM experts, if there are any."""

    slstm: SLSTMState | None
    """The state of the sLSTM experts, if there are any."""


class Bank(NamedTuple):
    """The experts of a kind."""

    name: str
    """``mlstm``, ``slstm`` or ``ffn``."""

    module: Any
    """Computes them; its parameters lead with their number."""

    begin: int
    """The number of the first one."""

    size: int
    """How many there are."""


def prepare_state(
    banks: Sequence[Bank], seqs: Tensor, state: ExpertsState | None, *, reuse: bool
) -> ExpertsState:
    """Return a state that a step may write into.

    :param banks: The banks.
    :param seqs: What they are going to read. *Shape:* ``(N,S,M)``.
    :param state: The state before it; ``None`` at the beginning of a text.
    :param reuse: See :func:`~moxe_plugin.nn.states.take_state`.

    :returns: The state, of all banks with memory.
    """
    states: dict[str, Any] = dict.fromkeys(ExpertsState._fields)

    for bank in banks:
        if bank.name not in states:
            continue

        before = None if state is None else getattr(state, bank.name)
        if before is None:
            states[bank.name] = bank.module.initial_state(seqs.size(0), seqs.device)
        else:
            states[bank.name] = take_state(before, reuse=reuse)

    return ExpertsState(**states)
