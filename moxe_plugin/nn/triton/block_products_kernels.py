"""The kernels of :mod:`moxe_plugin.nn.triton.block_products`.

A program has rows of one expert: see :func:`~moxe_plugin.nn.triton.partials.locate`.
It takes ``SPAN`` channels at a time, a multiple of the ``BLOCK`` that q, k and v mix,
and multiplies them by a square that is 0 outside its diagonal blocks: wider tiles are
worth more to memory than the zeros cost. The 2H gates are padded to ``GATES`` columns.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.partials import locate
from moxe_plugin.nn.triton.tile_products import multiply


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def cell_inputs_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    convolved,
    conv_input,
    q_weight,
    k_weight,
    v_weight,
    input_weight,
    forget_weight,
    input_bias,
    forget_bias,
    begins,
    qkv,
    gates,
    num_seqs,
    input_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    GATES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute q, k, v and the gates of a block of rows."""
    slot = tl.program_id(0)
    expert, begin, end = locate(begins, num_seqs, slot, ROWS, NUM_EXPERTS)
    if begin >= end:
        return

    row = (begin + tl.arange(0, ROWS))[:, None]
    is_row = row < end
    row = row.to(tl.int64)
    dtype = qkv.dtype.element_ty

    total = tl.zeros((ROWS, GATES), tl.float32)
    for start in range(0, WIDTH, SPAN):
        channel = start + tl.arange(0, SPAN)
        inside = is_row & (channel < WIDTH)[None, :]
        u = tl.load(
            convolved + row * WIDTH + channel[None, :], mask=inside, other=0.0
        ).to(dtype)
        a = tl.load(
            conv_input + row * input_stride + channel[None, :], mask=inside, other=0.0
        ).to(dtype)
        out = qkv + row * (3 * WIDTH) + channel[None, :]

        weight = _load_blocks(q_weight, expert, channel, WIDTH, BLOCK).to(dtype)
        q = multiply(u, weight, INTERPRETED, PRECISION).to(dtype)
        tl.store(out, q, mask=inside)

        weight = _load_blocks(k_weight, expert, channel, WIDTH, BLOCK).to(dtype)
        k = multiply(u, weight, INTERPRETED, PRECISION).to(dtype)
        tl.store(out + WIDTH, k, mask=inside)

        weight = _load_blocks(v_weight, expert, channel, WIDTH, BLOCK).to(dtype)
        v = multiply(a, weight, INTERPRETED, PRECISION).to(dtype)
        tl.store(out + 2 * WIDTH, v, mask=inside)

        at = expert * (3 * WIDTH) + channel
        is_channel = channel < WIDTH
        weight = _load_pair(
            input_weight, forget_weight, at, is_channel, NUM_HEADS, GATES
        )
        total += multiply(q, weight.to(dtype), INTERPRETED, PRECISION)
        weight = _load_pair(
            input_weight, forget_weight, at + WIDTH, is_channel, NUM_HEADS, GATES
        )
        total += multiply(k, weight.to(dtype), INTERPRETED, PRECISION)
        weight = _load_pair(
            input_weight, forget_weight, at + 2 * WIDTH, is_channel, NUM_HEADS, GATES
        )
        total += multiply(v, weight.to(dtype), INTERPRETED, PRECISION)

    gate = tl.arange(0, GATES)[None, :]
    is_input, is_forget = gate < NUM_HEADS, (gate >= NUM_HEADS) & (gate < 2 * NUM_HEADS)
    at = expert * NUM_HEADS + gate
    total += tl.load(input_bias + at, mask=is_input, other=0.0).to(tl.float32)
    total += tl.load(forget_bias + at - NUM_HEADS, mask=is_forget, other=0.0).to(
        tl.float32
    )
    tl.store(
        gates + row * (2 * NUM_HEADS) + gate,
        total,
        mask=is_row & (gate < 2 * NUM_HEADS),
    )


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def cell_inputs_backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    grad_qkv,
    grad_gates,
    convolved,
    conv_input,
    q_weight,
    k_weight,
    v_weight,
    input_weight,
    forget_weight,
    begins,
    grad_convolved,
    grad_conv_input,
    partials,
    num_seqs,
    grad_stride,
    input_stride,
    grad_convolved_stride,
    grad_input_stride,
    num_sums,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    GATES: tl.constexpr,
    ADDS_CONVOLVED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute all gradients of a long run of rows, for one span of channels.

    q, k and v are linear, so that with ``W_u = W_q W_gate_q + W_k W_gate_k`` and
    ``S = sum(u^T dg)``, where dg is the gates' gradient, what comes through the gates
    is ``du = … + dg W_u^T``, ``dW_q = … + S W_gate_q^T`` and ``dW_gate_q = W_q^T S``;
    for v alike. The products with S are computed once, and q, k and v are not read.
    """
    slot = tl.program_id(1)
    expert, begin, end = locate(begins, num_seqs, slot, RUN, NUM_EXPERTS)
    if begin >= end:
        return

    dtype = grad_qkv.dtype.element_ty
    channel = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    is_channel = channel < WIDTH
    gate = tl.arange(0, GATES)[None, :]
    at = expert * (3 * WIDTH) + channel

    q_block = _load_blocks(q_weight, expert, channel, WIDTH, BLOCK).to(dtype)
    k_block = _load_blocks(k_weight, expert, channel, WIDTH, BLOCK).to(dtype)
    v_block = _load_blocks(v_weight, expert, channel, WIDTH, BLOCK).to(dtype)
    q_gate = _load_pair(
        input_weight, forget_weight, at, is_channel, NUM_HEADS, GATES
    ).to(dtype)
    k_gate = _load_pair(
        input_weight, forget_weight, at + WIDTH, is_channel, NUM_HEADS, GATES
    ).to(dtype)
    v_gate = _load_pair(
        input_weight, forget_weight, at + 2 * WIDTH, is_channel, NUM_HEADS, GATES
    ).to(dtype)
    u_gate = multiply(q_block, q_gate, INTERPRETED, PRECISION)
    u_gate += multiply(k_block, k_gate, INTERPRETED, PRECISION)
    u_gate = u_gate.to(dtype)
    a_gate = multiply(v_block, v_gate, INTERPRETED, PRECISION).to(dtype)

    sum_q = tl.zeros((SPAN, SPAN), tl.float32)
    sum_k = tl.zeros((SPAN, SPAN), tl.float32)
    sum_v = tl.zeros((SPAN, SPAN), tl.float32)
    sum_u_gate = tl.zeros((SPAN, GATES), tl.float32)
    sum_a_gate = tl.zeros((SPAN, GATES), tl.float32)
    sum_gate = tl.zeros((ROWS, GATES), tl.float32)
    # No end that was loaded: a loop over a known range is what Triton reads ahead in.
    for start in range(0, RUN, ROWS):
        row = (begin + start + tl.arange(0, ROWS))[:, None]
        is_row = row < end
        row = row.to(tl.int64)
        inside = is_row & is_channel[None, :]
        grad = grad_qkv + row * grad_stride + channel[None, :]
        grad_q = tl.load(grad, mask=inside, other=0.0)
        grad_k = tl.load(grad + WIDTH, mask=inside, other=0.0)
        grad_v = tl.load(grad + 2 * WIDTH, mask=inside, other=0.0)
        wide_gate = tl.load(
            grad_gates + row * (2 * NUM_HEADS) + gate,
            mask=is_row & (gate < 2 * NUM_HEADS),
            other=0.0,
        )
        grad_gate = wide_gate.to(dtype)
        sum_gate += wide_gate
        u = tl.load(
            convolved + row * WIDTH + channel[None, :], mask=inside, other=0.0
        ).to(dtype)
        a = tl.load(
            conv_input + row * input_stride + channel[None, :], mask=inside, other=0.0
        ).to(dtype)

        grad_u = multiply(grad_q, tl.trans(q_block), INTERPRETED, PRECISION)
        grad_u += multiply(grad_k, tl.trans(k_block), INTERPRETED, PRECISION)
        grad_u += multiply(grad_gate, tl.trans(u_gate), INTERPRETED, PRECISION)
        out = grad_convolved + row * grad_convolved_stride + channel[None, :]
        if ADDS_CONVOLVED:
            grad_u += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, grad_u.to(grad_convolved.dtype.element_ty), mask=inside)

        grad_a = multiply(grad_v, tl.trans(v_block), INTERPRETED, PRECISION)
        grad_a += multiply(grad_gate, tl.trans(a_gate), INTERPRETED, PRECISION)
        out = grad_conv_input + row * grad_input_stride + channel[None, :]
        tl.store(out, grad_a.to(grad_conv_input.dtype.element_ty), mask=inside)

        u, a = tl.trans(u), tl.trans(a)
        sum_q += multiply(u, grad_q, INTERPRETED, PRECISION)
        sum_k += multiply(u, grad_k, INTERPRETED, PRECISION)
        sum_v += multiply(a, grad_v, INTERPRETED, PRECISION)
        sum_u_gate += multiply(u, grad_gate, INTERPRETED, PRECISION)
        sum_a_gate += multiply(a, grad_gate, INTERPRETED, PRECISION)

    sums = partials + slot.to(tl.int64) * num_sums
    size: tl.constexpr = WIDTH * BLOCK
    sum_q += _widened(sum_u_gate, tl.trans(q_gate), PRECISION)
    _store_blocks(sums, sum_q, channel, WIDTH, BLOCK)
    sum_k += _widened(sum_u_gate, tl.trans(k_gate), PRECISION)
    _store_blocks(sums + size, sum_k, channel, WIDTH, BLOCK)
    sum_v += _widened(sum_a_gate, tl.trans(v_gate), PRECISION)
    _store_blocks(sums + 2 * size, sum_v, channel, WIDTH, BLOCK)

    # Of the input gates all come first, then of the forget gates.
    sums += 3 * size
    half: tl.constexpr = 3 * WIDTH * NUM_HEADS
    at = channel[:, None] * NUM_HEADS + gate
    at += tl.where(gate < NUM_HEADS, 0, half - NUM_HEADS)
    is_weight = is_channel[:, None] & (gate < 2 * NUM_HEADS)
    tl.store(
        sums + at, _widened(tl.trans(q_block), sum_u_gate, PRECISION), mask=is_weight
    )
    sums += WIDTH * NUM_HEADS
    tl.store(
        sums + at, _widened(tl.trans(k_block), sum_u_gate, PRECISION), mask=is_weight
    )
    sums += WIDTH * NUM_HEADS
    tl.store(
        sums + at, _widened(tl.trans(v_block), sum_a_gate, PRECISION), mask=is_weight
    )

    if tl.program_id(0) == 0:
        sums += half + WIDTH * NUM_HEADS
        own = tl.arange(0, GATES)
        tl.store(sums + own, tl.sum(sum_gate, 0), mask=own < 2 * NUM_HEADS)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_blocks(weight, expert, channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # (G,B,B) -> (SPAN,SPAN), 0 outside of the diagonal blocks
    ins, outs = channel[:, None], channel[None, :]

    return tl.load(
        weight + expert * (WIDTH * BLOCK) + ins * BLOCK + outs % BLOCK,
        mask=(ins // BLOCK == outs // BLOCK) & (ins < WIDTH),
        other=0.0,
    )


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_blocks(out, square, channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    ins, outs = channel[:, None], channel[None, :]
    mask = (ins // BLOCK == outs // BLOCK) & (ins < WIDTH)
    tl.store(out + ins * BLOCK + outs % BLOCK, square, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_pair(  # type: ignore[no-untyped-def]  # as above
    input_weight,
    forget_weight,
    at,
    is_channel,
    NUM_HEADS: tl.constexpr,
    GATES: tl.constexpr,
):
    # Twice (…,H) -> (SPAN,GATES), 0 after the 2H-th column
    gate = tl.arange(0, GATES)[None, :]
    at = at[:, None] * NUM_HEADS + gate
    is_forget = (gate >= NUM_HEADS) & (gate < 2 * NUM_HEADS)
    is_channel = is_channel[:, None]

    pair = tl.load(input_weight + at, mask=is_channel & (gate < NUM_HEADS), other=0.0)
    pair += tl.load(
        forget_weight + at - NUM_HEADS, mask=is_channel & is_forget, other=0.0
    )
    return pair


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _widened(x, y, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # TensorFloat-32 has three more bits than bfloat16, and is as fast.
    return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
