"""How the kernels of the sLSTM are launched that read R at each step."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moxe_plugin.nn.triton.slstm_kernels import backward_kernel, forward_kernel

# The least rows, and inputs, of a product of tiles.
_BLOCK_N = 16
_BLOCK_K = 32


def scan_forward(
    lens: Tensor,
    gates_if: Tensor,
    gates_zo: Tensor,
    bias: Tensor,
    weight: Tensor,
    outputs: Tensor,
    activations: Tensor | None,
    cs: Tensor | None,
    c: Tensor,
    log_n: Tensor,
    y: Tensor,
) -> None:
    """Launch the forward kernel; all tensors are contiguous.

    :param lens: The length of each row, int32. *Shape:* ``(E,N)``.
    :param gates_if: See :class:`~moxe_plugin.nn.native.slstm_scan.SLSTMScanInputs`.
    :param gates_zo: As ``gates_if``.
    :param bias: *Shape:* ``(E,H,4,D)``.
    :param weight: *Shape:* ``(E,H,D,4,D)``.
    :param outputs: Gets the outputs. *Shape:* ``(E,N,S,H,D)``.
    :param activations: Gets w, 1 - sigmoid(f), tanh(z) and sigmoid(o), if the gradient
        needs them. *Shape:* ``(E,H,N,S,4,D)``.
    :param cs: Gets c after each step, likewise. *Shape:* ``(E,H,N,S,D)``.
    :param c: The memory, advanced in place. *Shape:* ``(E,N,H,D)``.
    :param log_n: As ``c``.
    :param y: As ``c``.
    """
    saves = activations is not None

    _launch(
        forward_kernel,
        (lens, gates_if, gates_zo, bias, weight, outputs),
        # Without them any pointer does: nothing is stored.
        (activations, cs) if saves else (outputs, outputs),
        (c, log_n, y),
        shape=outputs.shape,
        weight=weight,
        SAVES=saves,
    )


def scan_backward(
    lens: Tensor,
    transposed: Tensor,
    first_c: Tensor,
    outputs: Tensor,
    activations: Tensor,
    cs: Tensor,
    grad_outputs: Tensor,
    grad_if: Tensor,
    grad_zo: Tensor,
    grad_c: Tensor,
    grad_log_n: Tensor,
    grad_y: Tensor,
) -> None:
    """Launch the backward kernel; all tensors are contiguous.

    :param lens: As in :func:`scan_forward`.
    :param transposed: R, output first. *Shape:* ``(E,H,4*D,D)``.
    :param first_c: c before the first step. *Shape:* ``(E,N,H,D)``.
    :param outputs: As :func:`scan_forward` left it.
    :param activations: As :func:`scan_forward` left it.
    :param cs: As :func:`scan_forward` left it.
    :param grad_outputs: The gradient of the outputs. *Shape:* as ``outputs``.
    :param grad_if: Gets the gradient of i and f, where rows have positions. *Shape:*
        ``(E,H,N,S,2D)``.
    :param grad_zo: Gets that of z and o. *Shape:* as ``grad_if``.
    :param grad_c: The gradient of the last c; becomes that of the first. *Shape:*
        ``(E,N,H,D)``.
    :param grad_log_n: The same of log_n.
    :param grad_y: The same of y.
    """
    _launch(
        backward_kernel,
        (lens, transposed, first_c, outputs, activations, cs),
        (grad_outputs, grad_if, grad_zo),
        (grad_c, grad_log_n, grad_y),
        shape=outputs.shape,
        weight=transposed,
    )


def _launch(
    kernel: Any,
    *tensors: tuple[Tensor | None, ...],
    shape: tuple[int, ...],
    weight: Tensor,
    **flags: bool,
) -> None:
    num_experts, num_rows, num_steps, num_heads, head_dim = shape
    grid = (triton.cdiv(num_rows, _BLOCK_N), num_heads, num_experts)

    if 0 in (*grid, num_steps):
        return

    # TensorFloat-32 only where torch's own products may use it.
    highest = torch.get_float32_matmul_precision() == "highest"

    kernel[grid](
        *(x for group in tensors for x in group),
        num_heads,
        num_rows,
        num_steps,
        D=head_dim,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_K=_BLOCK_K,
        PRECISION="ieee" if weight.dtype == torch.float32 and highest else "tf32",
        num_warps=8,
        # What is read ahead must fit in shared memory: 139 kB at D = 160, float32.
        num_stages=2,
        **flags,
    )
