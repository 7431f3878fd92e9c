"""What the forms of the mLSTM cell in C++ have in common: the cell over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast


class NormalizerLimits(NamedTuple):
    """The numbers of the cell's normaliser, see :mod:`moxe_plugin.nn.mlstm_cell`."""

    max_exponent: float
    """``MAX_EXPONENT``."""

    eps: float
    """``NORMALIZER_EPS``."""


class CellGradients(NamedTuple):
    """The gradients of what the cell reads, in tensors that are the caller's."""

    q: Tensor
    """Of the queries. *Shape:* ``(C,H,D)``."""

    k: Tensor
    """Of the keys. *Shape:* ``(C,H,D)``."""

    v: Tensor
    """Of the values. *Shape:* ``(C,H,D)``."""

    gates: Tensor
    """Of the pre-activations of the gates. *Shape:* ``(C,2H)``."""


class MLSTMForm(Protocol):
    """Computes the cell over certain sequences, and its gradients."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the cell, from an empty memory.

        All are float32 or all float64, contiguous and on the CPU. Beside gates of
        float32, the others may be bfloat16 where products in C++ multiply it.

        :param q: The queries. *Shape:* ``(C,H,D)``.
        :param k: The keys. *Shape:* ``(C,H,D)``.
        :param v: The values. *Shape:* ``(C,H,D)``.
        :param gates: The pre-activations of the input gates, then those of the forget
            gates. *Shape:* ``(C,2H)``.

        :returns: The outputs ``(C,H,D)``, as ``q`` and 0 at padding, and what
            :meth:`backward` wants.

        :raises NativeLibraryError: The C++ code cannot be compiled here.
        """

    def backward(self, saved: Sequence[Tensor], grad_hidden: Tensor) -> CellGradients:
        """Compute the gradients.

        :param saved: What :meth:`forward` has returned for it.
        :param grad_hidden: That of the outputs; contiguous. *Shape:* ``(C,H,D)``.

        :returns: Those of its inputs, 0 at padding.
        """


def run_form(form: MLSTMForm, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Run the cell, with gradients; see :meth:`MLSTMForm.forward`.

    :param form: Computes it.
    :param q: The queries. *Shape:* ``(C,H,D)``.
    :param k: The keys. *Shape:* ``(C,H,D)``.
    :param v: The values. *Shape:* ``(C,H,D)``.
    :param gates: The gates. *Shape:* ``(C,2H)``.

    :returns: The outputs. *Shape:* ``(C,H,D)``.
    """
    return _Form.apply(form, q, k, v, gates)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _Form(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(ctx: Any, form: MLSTMForm, *inputs: Tensor) -> Tensor:
        q, k, v, gates = (x.contiguous() for x in inputs)
        hidden, saved = form.forward(q, k, v, gates)

        ctx.save_for_backward(*saved)
        ctx.form = form

        return hidden

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        form: MLSTMForm = ctx.form

        return None, *form.backward(ctx.saved_tensors, grad_hidden.contiguous())
