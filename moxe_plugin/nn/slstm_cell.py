"""The sLSTM cell: one step (the reference) and a whole sequence with its own backward.

Scalar memory with exponential input gate, sigmoid forget gate and head-wise recurrent
matrix (xLSTM, arXiv 2405.04517, eqs. (8)-(18)). The output depends on the memory only
through the ratio ``c/n``, so instead of ``c``, ``n`` and a stabiliser m we keep that
ratio, in [-1, 1], and the logarithm of the true n, ``log(n) + m``. With ``w = sigmoid(i
- logsigmoid(f) - log_n')`` both forms are the same function::

    c/n = (1 - w) c'/n' + w tanh(z)        log_n = logaddexp(logsigmoid(f) + log_n', i)

Nothing overflows and there is no choice of stabiliser for gradients to pass through.

B is experts times heads (``E*H``, or ``H``). The batch N comes last and time first, so
that what one step needs of each gate is contiguous. All tensors have one dtype, float32
or float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SLSTMMemory(NamedTuple):
    """The memory of sLSTM cells."""

    c: Tensor
    """The ratio ``c/n``; 0 before the first step. *Shape:* ``(B,D,N)``."""

    log_n: Tensor
    """The logarithm of the true n; ``EMPTY`` before the first step."""

    y: Tensor
    """The last output, which recurs; 0 before the first step."""


class SLSTMScanInputs(NamedTuple):
    """What a scan of whole batches reads: see ``moxe_plugin.nn.triton``."""

    gates_if: Tensor
    """The inputs' share of the pre-activations of i and f. *Shape:* ``(E,H,N,S,2D)``.
    """

    gates_zo: Tensor
    """The same of z and o. *Shape:* ``(E,H,N,S,2D)``."""

    bias: Tensor
    """The bias of i, f, z, o. *Shape:* ``(E,H,4,D)``."""

    recurrent_weight: Tensor
    """R, input first. *Shape:* ``(E,H,D,4,D)``."""

    c: Tensor
    """See :class:`SLSTMMemory`. *Shape:* ``(E,N,H,D)``."""

    log_n: Tensor
    """As ``c``."""

    y: Tensor
    """As ``c``."""


def slstm_step(
    gate_inputs: Tensor, recurrent_weight: Tensor, memory: SLSTMMemory
) -> tuple[Tensor, SLSTMMemory]:
    """Advance the cell by one position, in the paper's form.

    With the pre-activations ``i, f, z, o = g_in + R y'``::

        m = max(logsigmoid(f) + m', i)
        c = exp(logsigmoid(f) + m' - m) c' + exp(i - m) tanh(z)
        n = exp(logsigmoid(f) + m' - m) n' + exp(i - m)
        y = sigmoid(o) c/n

    Then c is divided by n, and ``log(n)`` moves into m.

    :param gate_inputs: What the input and the bias contribute to the pre-activations of
        the gates i, f, z, o. *Shape:* ``(B,4,D,N)``.
    :param recurrent_weight: R. *Shape:* ``(B,D,4,D)``, input first.
    :param memory: The memory before this position.

    :returns: The output ``y`` ``(B,D,N)`` and the memory after this position.
    """
    recurrent = torch.einsum("bigo,bin->bgon", recurrent_weight, memory.y)
    i, f, z, o = (gate_inputs + recurrent).unbind(1)

    log_kept = F.logsigmoid(f) + memory.log_n
    m = torch.maximum(i, log_kept)
    kept, added = torch.exp(log_kept - m), torch.exp(i - m)

    n = kept + added
    c = (kept * memory.c + added * torch.tanh(z)) / n
    y = torch.sigmoid(o) * c

    return y, SLSTMMemory(c, m + torch.log(n), y)


def slstm_sequence(
    gate_inputs: Tensor, recurrent_weight: Tensor, memory: SLSTMMemory
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`slstm_step` over a sequence.

    :param gate_inputs: As in :func:`slstm_step`, of all steps. *Shape:*
        ``(S,B,4,D,N)``.
    :param recurrent_weight: As in :func:`slstm_step`.
    :param memory: The memory before the first position.

    :returns: All outputs ``(S,B,D,N)``, and the ``c`` and ``log_n`` of the memory after
        the last position.
    """
    y, c, log_n = _SLSTMSequence.apply(gate_inputs, recurrent_weight, *memory)  # type: ignore[no-untyped-call]  # torch leaves apply untyped

    return y, c, log_n


class _SLSTMSequence(Function):
    """The loop over time, forwards and backwards, without autograd inside it.

    A step costs one batched product with R and a few elementwise operations. Backwards,
    all that does not depend on later steps is computed for all steps at once, and so is
    the gradient of R: one product over all steps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_inputs: Tensor,
        recurrent_weight: Tensor,
        c: Tensor,
        log_n: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_steps, *state_shape = *gate_inputs.shape[:2], *gate_inputs.shape[3:]
        # (B,D,4,D) -> (B,4*D,D)
        weight = recurrent_weight.flatten(2).mT.contiguous()

        # Become w (in the place of f), tanh(z) and sigmoid(o); i stays as it is.
        gates = torch.empty_like(gate_inputs, memory_format=torch.contiguous_format)
        log_forget = gates.new_empty(num_steps, *state_shape)
        cs = gates.new_empty(num_steps + 1, *state_shape)
        ys = gates.new_empty(num_steps + 1, *state_shape)
        cs[0], ys[0] = c, y
        log_n = log_n.clone()
        log_kept = torch.empty_like(log_n)

        steps = zip(
            gate_inputs.flatten(2, 3),
            gates.flatten(2, 3),
            *gates.unbind(2),
            log_forget,
            cs[:-1],
            cs[1:],
            ys[:-1],
            ys[1:],
            strict=True,
        )

        for gate_input, gate, i, f, z, o, log_f, c_old, c_new, y_old, y_new in steps:
            torch.baddbmm(gate_input, weight, y_old, out=gate)
            log_f.copy_(F.logsigmoid(f))
            torch.add(log_f, log_n, out=log_kept)
            torch.sub(i, log_kept, out=f).sigmoid_()
            torch.logaddexp(log_kept, i, out=log_n)
            torch.lerp(c_old, z.tanh_(), f, out=c_new)
            torch.mul(o.sigmoid_(), c_new, out=y_new)

        ctx.save_for_backward(weight, gates, log_forget, cs, ys)

        return ys[1:].clone(), cs[-1].clone(), log_n

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor, grad_c: Tensor, grad_log_n: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        weight, gates, log_forget, cs, ys = ctx.saved_tensors
        _, w, z, o = gates.unbind(2)

        kept = 1 - w
        c_to_i = w * kept * (z - cs[:-1])
        c_to_z = w * (1 - z.square())
        log_n_to_f = -torch.expm1(log_forget)
        y_to_o = ys[1:] * (1 - o)

        grad_gates = torch.empty_like(gates)
        grad_y = torch.zeros_like(ys[0])
        grad_c, grad_log_n = grad_c.clone(), grad_log_n.clone()

        steps = zip(
            grad_outputs,
            grad_gates.flatten(2, 3),
            *grad_gates.unbind(2),
            *(w, o, kept, c_to_i, c_to_z, log_n_to_f, y_to_o),
            strict=True,
        )

        for grad_output, grad_gate, di, df, dz, do, w_t, o_t, kept_t, *to in reversed(
            list(steps)
        ):
            c_to_i_t, c_to_z_t, log_n_to_f_t, y_to_o_t = to

            grad_y += grad_output
            grad_c.addcmul_(grad_y, o_t)
            torch.mul(grad_c, c_to_i_t, out=di).addcmul_(grad_log_n, w_t)
            grad_log_n -= di
            torch.mul(grad_log_n, log_n_to_f_t, out=df)
            torch.mul(grad_c, c_to_z_t, out=dz)
            torch.mul(grad_y, y_to_o_t, out=do)
            grad_c *= kept_t
            torch.bmm(weight.mT, grad_gate, out=grad_y)

        # (S,B,D,N), (S,B,4*D,N) -> (B,D,4*D)
        grad_weight = ys[:-1].permute(1, 2, 0, 3).flatten(2) @ grad_gates.permute(
            1, 0, 4, 2, 3
        ).flatten(3).flatten(1, 2)

        return (
            grad_gates,
            grad_weight.unflatten(2, gates.shape[2:4]),
            grad_c,
            grad_log_n,
            grad_y,
        )
