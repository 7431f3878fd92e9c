"""The kernels of one step of the mLSTM block; see :mod:`.block_steps`.

Where a kernel overwrites what it has read, a barrier is between: of few elements,
several threads hold the same one. What several programs read, a later kernel writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.gate_functions import log_sigmoid, silu
from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.step_products import (
    find_moments,
    find_unit,
    multiply_tile,
)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def mlstm_step_inputs_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    inner,
    window,
    conv_weight,
    conv_bias,
    q_proj,
    k_proj,
    v_proj,
    input_gate,
    forget_gate,
    experts,
    convolved,
    qkv,
    partials,
    first,
    E,
    K,
    N,
    I: tl.constexpr,  # noqa: E741  # the inner width
    B: tl.constexpr,
    H: tl.constexpr,
    TAPS: tl.constexpr,
    POW_B: tl.constexpr,
    POW_H: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Convolve a block of B channels, mix it to q, k and v, and weigh it for gates."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    b = tl.arange(0, POW_B)
    channel = block * B + b
    is_b = b < B

    a = tl.load(inner + unit * 2 * I + channel, mask=is_b, other=0.0)
    at_tap = conv_weight + expert * TAPS * I + channel
    u = tl.load(conv_bias + expert * I + channel, mask=is_b, other=0.0).to(tl.float32)
    u += a * tl.load(at_tap + (TAPS - 1) * I, mask=is_b, other=0.0).to(tl.float32)
    at_window = window + (expert * N + row) * (TAPS - 1) * I + channel
    olds = ()
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(at_window + tap * I, mask=is_b, other=0.0)
        tap_weight = tl.load(at_tap + tap * I, mask=is_b, other=0.0)
        u += old.to(tl.float32) * tap_weight.to(tl.float32)
        olds = olds + (old,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no starred tuples
    tl.debug_barrier()
    for tap in tl.static_range(1, TAPS - 1):
        tl.store(at_window + (tap - 1) * I, olds[tap], mask=is_b)
    latest = a.to(window.dtype.element_ty)
    tl.store(at_window + (TAPS - 2) * I, latest, mask=is_b)
    u = silu(u)
    tl.store(convolved + unit * I + channel, u, mask=is_b)

    at_mix = (expert * num_blocks + block) * B * B
    mask = is_b[:, None] & is_b[None, :]
    q = multiply_tile(u, q_proj + at_mix, b * B, b, mask)
    k = multiply_tile(u, k_proj + at_mix, b * B, b, mask)
    v = multiply_tile(a, v_proj + at_mix, b * B, b, mask)
    at = qkv + unit * 3 * I + channel
    tl.store(at, q, mask=is_b)
    tl.store(at + I, k, mask=is_b)
    tl.store(at + 2 * I, v, mask=is_b)

    h = tl.arange(0, POW_H)
    at_gate = (expert * 3 * I + block * B) * H
    mask = is_b[:, None] & (h < H)[None, :]
    i = multiply_tile(q, input_gate + at_gate, b * H, h, mask)
    i += multiply_tile(k, input_gate + at_gate + I * H, b * H, h, mask)
    i += multiply_tile(v, input_gate + at_gate + 2 * I * H, b * H, h, mask)
    f = multiply_tile(q, forget_gate + at_gate, b * H, h, mask)
    f += multiply_tile(k, forget_gate + at_gate + I * H, b * H, h, mask)
    f += multiply_tile(v, forget_gate + at_gate + 2 * I * H, b * H, h, mask)
    at = partials + (unit * num_blocks + block) * 2 * H + h
    tl.store(at, i, mask=h < H)
    tl.store(at + H, f, mask=h < H)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _find_gates(  # type: ignore[no-untyped-def]  # as above
    partials,
    input_bias,
    forget_bias,
    m,
    unit,
    expert,
    head,
    at,
    H: tl.constexpr,
    G: tl.constexpr,
    POW_G: tl.constexpr,
):
    # What the memory is weighed by, what is added, and the new stabiliser
    g = tl.arange(0, POW_G)
    at_partial = partials + (unit * G + g) * 2 * H + head
    i = tl.sum(tl.load(at_partial, mask=g < G, other=0.0), 0)
    f = tl.sum(tl.load(at_partial + H, mask=g < G, other=0.0), 0)
    i += tl.load(input_bias + expert * H + head).to(tl.float32)
    f += tl.load(forget_bias + expert * H + head).to(tl.float32)
    log_kept = log_sigmoid(f) + tl.load(m + at)
    peak = tl.maximum(log_kept, i)
    return tl.exp(log_kept - peak), tl.exp(i - peak), peak


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_step_cell_kernel(  # type: ignore[no-untyped-def]  # as above
    qkv,
    partials,
    input_bias,
    forget_bias,
    c,
    n,
    m,
    experts,
    hidden,
    first,
    E,
    K,
    N,
    scale,
    max_exponent,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    POW_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Advance some columns of a head's matrix memory, and read them."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    head = tl.program_id(1)
    at = (expert * N + row) * H + head
    kept, added, peak = _find_gates(
        partials, input_bias, forget_bias, m, unit, expert, head, at, H, G, POW_G
    )
    added *= scale

    cols = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    at_vectors = qkv + unit * 3 * H * D + head * D
    v = tl.load(at_vectors + 2 * H * D + cols, mask=cols < D, other=0.0)
    total = tl.zeros((BLOCK_V,), tl.float32)
    denominator = 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(at_vectors + d, mask=d < D, other=0.0)
        key = added * tl.load(at_vectors + H * D + d, mask=d < D, other=0.0)
        normalizer = tl.load(n + at * D + d, mask=d < D, other=0.0)
        denominator += tl.sum(q * (kept * normalizer + key), 0)
        at_c = c + (at * D + d)[:, None] * D + cols[None, :]
        mask = (d < D)[:, None] & (cols < D)[None, :]
        tile = kept * tl.load(at_c, mask=mask, other=0.0) + key[:, None] * v[None, :]
        if BLOCK_D < 32:
            # Several threads hold an element of a small tile.
            tl.debug_barrier()
        tl.store(at_c, tile, mask=mask)
        total += tl.sum(q[:, None] * tile, 0)

    floor = tl.exp(tl.minimum(-peak, max_exponent))
    h = total / (tl.maximum(tl.abs(denominator), floor) + eps)
    tl.store(hidden + unit * H * D + head * D + cols, h, mask=cols < D)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def mlstm_step_output_kernel(  # type: ignore[no-untyped-def]  # as above
    hidden,
    inner,
    convolved,
    qkv,
    partials,
    input_bias,
    forget_bias,
    out_norm,
    skip,
    n,
    m,
    experts,
    out,
    first,
    E,
    K,
    N,
    scale,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    POW_G: tl.constexpr,
    POW_D: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Normalise and gate a head's output, and advance the rest of its memory."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    head = tl.program_id(1)
    at = (expert * N + row) * H + head
    kept, added, peak = _find_gates(
        partials, input_bias, forget_bias, m, unit, expert, head, at, H, G, POW_G
    )
    d = tl.arange(0, POW_D)
    is_d = d < D
    channel = head * D + d
    width: tl.constexpr = H * D
    key = tl.load(qkv + unit * 3 * width + width + channel, mask=is_d, other=0.0)
    normalizer = tl.load(n + at * D + d, mask=is_d, other=0.0)
    # All threads have read the old n and m.
    tl.debug_barrier()
    tl.store(n + at * D + d, kept * normalizer + added * scale * key, mask=is_d)
    tl.store(m + at, peak)

    h = tl.load(hidden + unit * width + channel, mask=is_d, other=0.0)
    mean, inverse = find_moments(h, is_d, D, eps)
    at_channel = expert * width + channel
    h = (h - mean) * inverse
    h *= tl.load(out_norm + at_channel, mask=is_d, other=0.0).to(tl.float32)
    u = tl.load(convolved + unit * width + channel, mask=is_d, other=0.0)
    h += u * tl.load(skip + at_channel, mask=is_d, other=0.0).to(tl.float32)
    gate = tl.load(inner + unit * 2 * width + width + channel, mask=is_d, other=0.0)
    tl.store(out + unit * width + channel, h * silu(gate), mask=is_d)
