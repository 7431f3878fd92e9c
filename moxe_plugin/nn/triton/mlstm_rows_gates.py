"""The kernels of the gates of the mLSTM on ragged rows, forward and backward.

Formulas and names are in :mod:`moxe_plugin.nn.triton.mlstm_rows`. Imports triton, so it
is imported by who runs it only. A program has one segment and head.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.gate_functions import log_sigmoid
from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.mlstm_rows_tiles import place


@triton.jit
def larger(x, y):  # type: ignore[no-untyped-def]  # Triton has no annotations
    """Combine two values in a running maximum."""
    return tl.maximum(x, y)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_rows_gate_kernel(  # type: ignore[no-untyped-def]  # as above
    gates,
    begins,
    small,
    stride,
    num_rows,
    max_exponent,
    BLOCK: tl.constexpr,
):
    """Compute a, A and the floor of a segment and head."""
    _, begin, length, head, at = place(begins, 1, num_rows)
    num_heads = tl.num_programs(1)
    plane = num_heads.to(tl.int64) * num_rows
    i = tl.arange(0, BLOCK)

    last_decay = 0.0
    last_peak = float("-inf")
    start = 0
    while start < length:
        t = start + i
        valid = t < length
        gate = gates + (begin + t) * stride + head
        input_preact = tl.load(gate, mask=valid, other=float("-inf"))
        forget_preact = tl.load(gate + num_heads, mask=valid, other=0.0)

        log_forget = tl.where(valid, log_sigmoid(forget_preact), 0.0)
        log_decay = last_decay + tl.cumsum(log_forget, 0)
        a = input_preact - log_decay
        peak = tl.maximum(tl.associative_scan(a, 0, larger), last_peak)
        floor = tl.exp(tl.minimum(-log_decay - peak, max_exponent))

        out = small + at + t
        tl.store(out, a, mask=valid)
        tl.store(out + plane, peak, mask=valid)
        tl.store(out + 2 * plane, floor, mask=valid)

        last_decay += tl.sum(log_forget, 0)
        last_peak = tl.maximum(last_peak, tl.max(a, 0))
        start += BLOCK


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_rows_gate_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    gates,
    begins,
    grad_small,
    grad_gates,
    stride,
    num_rows,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of both gates of a segment and head."""
    _, begin, length, head, at = place(begins, 1, num_rows)
    num_heads = tl.num_programs(1)
    plane = num_heads.to(tl.int64) * num_rows
    i = tl.arange(0, BLOCK)

    # The gradient of all decays from here on
    later = 0.0
    start = (length + BLOCK - 1) // BLOCK * BLOCK - BLOCK
    while start >= 0:
        t = start + i
        valid = t < length
        forget_preact = tl.load(
            gates + (begin + t) * stride + num_heads + head, mask=valid, other=0.0
        )
        grad_m = tl.load(grad_small + at + t, mask=valid, other=0.0)
        grad_a = tl.load(grad_small + plane + at + t, mask=valid, other=0.0)

        grad_decay = grad_m - grad_a
        grad_log_forget = later + tl.cumsum(grad_decay, 0, reverse=True)
        # 1 - sigmoid(f), of exponents that cannot overflow
        small_exp = tl.exp(-tl.abs(forget_preact))
        closing = tl.where(forget_preact > 0.0, small_exp, 1.0) / (1.0 + small_exp)
        grad_forget = grad_log_forget * closing

        out = grad_gates + (begin + t) * 2 * num_heads + head
        tl.store(out, grad_a, mask=valid)
        tl.store(out + num_heads, grad_forget, mask=valid)

        later += tl.sum(grad_decay, 0)
        start -= BLOCK
