"""The kernels of :mod:`moxe_plugin.nn.triton.head_products`.

A program has rows of one expert (see :func:`~moxe_plugin.nn.triton.partials.locate`),
one head, and one pair of gates: i and f, or z and o. ``D = P + Q``, both powers of 2 as
Triton's tiles are, Q maybe 0: so no column is padded.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.partials import locate
from moxe_plugin.nn.triton.tile_products import multiply


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def gate_products_kernel(  # type: ignore[no-untyped-def]  # as above
    convolved,
    normed,
    gate_proj,
    begins,
    gates_if,
    gates_zo,
    num_seqs,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a block of rows by the weight of two gates, ``COLS`` columns a time."""
    head, pair = tl.program_id(0) // 2, tl.program_id(0) % 2
    expert, begin, end = locate(begins, num_seqs, tl.program_id(1), ROWS, NUM_EXPERTS)
    if begin >= end:
        return

    if pair == 0:
        source, out = convolved, gates_if
    else:
        source, out = normed, gates_zo

    row = tl.arange(0, ROWS)[:, None]
    is_row = row < end - begin
    first = begin.to(tl.int64)
    col = tl.arange(0, COLS)[None, :]
    source += first * (H * D) + head * D + row * (H * D)
    out += first * (H * 2 * D) + head * (2 * D) + row * (H * 2 * D) + col
    weight = gate_proj + (expert * H + head) * (4 * D * D) + pair * (2 * D) + col

    body = tl.arange(0, P)
    x = tl.load(source + body[None, :], mask=is_row, other=0.0)
    weight_body = weight + body[:, None] * (4 * D)
    if Q > 0:
        tail = P + tl.arange(0, Q)
        x_tail = tl.load(source + tail[None, :], mask=is_row, other=0.0)
        weight_tail = weight + tail[:, None] * (4 * D)

    for start in range(0, 2 * D, COLS):
        gates = multiply(x, tl.load(weight_body + start), INTERPRETED, PRECISION)
        if Q > 0:
            gates += multiply(
                x_tail, tl.load(weight_tail + start), INTERPRETED, PRECISION
            )
        tl.store(out + start, gates.to(out.dtype.element_ty), mask=is_row)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def gate_products_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_if,
    grad_zo,
    gate_proj,
    begins,
    grad_convolved,
    grad_normed,
    num_seqs,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply gradients of a block of rows by the transposed weight of two gates."""
    head, pair = tl.program_id(0) // 2, tl.program_id(0) % 2
    expert, begin, end = locate(begins, num_seqs, tl.program_id(1), ROWS, NUM_EXPERTS)
    if begin >= end:
        return

    if pair == 0:
        source, out = grad_if, grad_convolved
    else:
        source, out = grad_zo, grad_normed

    row = tl.arange(0, ROWS)[:, None]
    is_row = row < end - begin
    first = begin.to(tl.int64)
    col = tl.arange(0, COLS)[None, :]
    source += first * (H * 2 * D) + head * (2 * D) + row * (H * 2 * D) + col
    out += first * (H * D) + head * D + row * (H * D)
    weight = gate_proj + (expert * H + head) * (4 * D * D) + pair * (2 * D) + col

    body = tl.arange(0, P)
    weight_body = weight + body[:, None] * (4 * D)
    grad_body = tl.zeros((ROWS, P), tl.float32)
    if Q > 0:
        tail = P + tl.arange(0, Q)
        weight_tail = weight + tail[:, None] * (4 * D)
        grad_tail = tl.zeros((ROWS, Q), tl.float32)

    for start in range(0, 2 * D, COLS):
        grads = tl.load(source + start, mask=is_row, other=0.0)
        part = tl.load(weight_body + start)
        grad_body += multiply(grads, tl.trans(part), INTERPRETED, PRECISION)
        if Q > 0:
            part = tl.load(weight_tail + start)
            grad_tail += multiply(grads, tl.trans(part), INTERPRETED, PRECISION)

    dtype = out.dtype.element_ty
    tl.store(out + body[None, :], grad_body.to(dtype), mask=is_row)
    if Q > 0:
        tl.store(out + tail[None, :], grad_tail.to(dtype), mask=is_row)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def gate_weight_grads_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    before,
    convolved,
    normed,
    grad_if,
    grad_zo,
    begins,
    partials,
    num_seqs,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum up ``x^T grads`` over a run of rows, where x is one input of two gates.

    What is large is the traffic from the second-level cache, so that a program has all
    ``D x 2*D`` sums. They are transposed, as the tensor cores take more rows than Q.
    """
    head, pair = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2
    is_recurrent = tl.program_id(0) % 2 == 0
    slot = tl.program_id(1)
    _, begin, end = locate(begins, num_seqs, slot, RUN, NUM_EXPERTS)
    if begin >= end:
        return

    if pair == 0:
        source, grad_source = convolved, grad_if
    else:
        source, grad_source = normed, grad_zo
    out = partials + slot.to(tl.int64) * (2 * H * 4 * D * D)
    if is_recurrent:
        source = before
    else:
        out += H * 4 * D * D

    first, num_rows = begin.to(tl.int64), end - begin
    source += first * (H * D) + head * D
    grad_source += first * (H * 2 * D) + head * (2 * D)
    out += head * (4 * D * D) + pair * (2 * D)

    row = tl.arange(0, ROWS)[:, None]
    body, grad_body = tl.arange(0, P), tl.arange(0, 2 * P)
    sum_body = tl.zeros((2 * P, P), tl.float32)
    if Q > 0:
        tail, grad_tail = P + tl.arange(0, Q), 2 * P + tl.arange(0, 2 * Q)
        sum_right = tl.zeros((2 * P, Q), tl.float32)
        sum_lower = tl.zeros((2 * Q, P), tl.float32)
        sum_tail = tl.zeros((2 * Q, Q), tl.float32)

    # The interpreter takes no tensor as the end of a range.
    for start in range(0, RUN if INTERPRETED else num_rows, ROWS):
        is_row = row < num_rows - start
        at, grad_at = row * (H * D), row * (H * 2 * D)
        x = tl.load(source + (at + body[None, :]), mask=is_row, other=0.0)
        grads = tl.load(
            grad_source + (grad_at + grad_body[None, :]), mask=is_row, other=0.0
        )
        grads = tl.trans(grads)
        sum_body += multiply(grads, x, INTERPRETED, PRECISION)
        if Q > 0:
            x_tail = tl.load(source + (at + tail[None, :]), mask=is_row, other=0.0)
            lower = tl.load(
                grad_source + (grad_at + grad_tail[None, :]), mask=is_row, other=0.0
            )
            lower = tl.trans(lower)
            sum_right += multiply(grads, x_tail, INTERPRETED, PRECISION)
            sum_lower += multiply(lower, x, INTERPRETED, PRECISION)
            sum_tail += multiply(lower, x_tail, INTERPRETED, PRECISION)
        source += ROWS * H * D
        grad_source += ROWS * H * 2 * D

    _store_transposed(out, sum_body, grad_body, body, D)
    if Q > 0:
        _store_transposed(out, sum_right, grad_body, tail, D)
        _store_transposed(out, sum_lower, grad_tail, body, D)
        _store_transposed(out, sum_tail, grad_tail, tail, D)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_transposed(out, sums, col, row, D: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    tl.store(out + row[None, :] * (4 * D) + col[:, None], sums)
