"""The kernels of one step of the sLSTM block; see :mod:`.block_steps`.

Where a kernel overwrites what it has read, a barrier is between: of few elements,
several threads hold the same one. What several programs read, a later kernel writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.gate_functions import log_sigmoid, sigmoid, silu
from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.step_products import (
    find_moments,
    find_unit,
    multiply_tile,
)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def slstm_step_cell_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    tokens,
    norm,
    window,
    conv_weight,
    conv_bias,
    gate_proj,
    recurrent,
    bias,
    c,
    log_n,
    y,
    experts,
    new_y,
    first,
    E,
    K,
    N,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    POW_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Advance some channels of a head, all but y and the window."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    M: tl.constexpr = H * D
    head = tl.program_id(1)
    x = tokens + row * M
    all_m = tl.arange(0, POW_M)
    whole = tl.load(x + all_m, mask=all_m < M, other=0.0).to(tl.float32)
    mean, inverse = find_moments(whole, all_m < M, M, eps)

    outs = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_out = outs < D
    stack = expert * H + head
    at_bias = bias + stack * 4 * D + outs
    i = tl.load(at_bias, mask=is_out, other=0.0).to(tl.float32)
    f = tl.load(at_bias + D, mask=is_out, other=0.0).to(tl.float32)
    z = tl.load(at_bias + 2 * D, mask=is_out, other=0.0).to(tl.float32)
    o = tl.load(at_bias + 3 * D, mask=is_out, other=0.0).to(tl.float32)
    memory = expert * N + row
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < D
        channel = head * D + d
        part = tl.load(x + channel, mask=is_d, other=0.0).to(tl.float32)
        scale = tl.load(norm + expert * M + channel, mask=is_d, other=0.0)
        # 0 beyond D, as the scale is
        part = (part - mean) * inverse * scale.to(tl.float32)

        at_tap = conv_weight + expert * TAPS * M + channel
        u = tl.load(conv_bias + expert * M + channel, mask=is_d, other=0.0)
        tap_weight = tl.load(at_tap + (TAPS - 1) * M, mask=is_d, other=0.0)
        u = u.to(tl.float32) + part * tap_weight.to(tl.float32)
        for tap in tl.static_range(TAPS - 1):
            at_old = window + (memory * (TAPS - 1) + tap) * M + channel
            old = tl.load(at_old, mask=is_d, other=0.0).to(tl.float32)
            tap_weight = tl.load(at_tap + tap * M, mask=is_d, other=0.0)
            u += old * tap_weight.to(tl.float32)
        u = silu(u)

        old = tl.load(y + memory * M + channel, mask=is_d, other=0.0)
        rows = (stack * D + d) * (4 * D)
        mask = is_d[:, None] & is_out[None, :]
        i += multiply_tile(u, gate_proj, rows, outs, mask)
        i += multiply_tile(old, recurrent, rows, outs, mask)
        f += multiply_tile(u, gate_proj + D, rows, outs, mask)
        f += multiply_tile(old, recurrent + D, rows, outs, mask)
        z += multiply_tile(part, gate_proj + 2 * D, rows, outs, mask)
        z += multiply_tile(old, recurrent + 2 * D, rows, outs, mask)
        o += multiply_tile(part, gate_proj + 3 * D, rows, outs, mask)
        o += multiply_tile(old, recurrent + 3 * D, rows, outs, mask)

    at = memory * M + head * D + outs
    c_old = tl.load(c + at, mask=is_out, other=0.0)
    log_n_old = tl.load(log_n + at, mask=is_out, other=0.0)
    log_kept = log_sigmoid(f) + log_n_old
    w = sigmoid(i - log_kept)
    c_new = c_old + w * (2.0 * sigmoid(2.0 * z) - 1.0 - c_old)
    higher = tl.maximum(log_kept, i)
    log_n_new = higher + tl.log(1.0 + tl.exp(-tl.abs(log_kept - i)))
    # All threads have read the old ones.
    tl.debug_barrier()
    tl.store(c + at, c_new, mask=is_out)
    tl.store(log_n + at, log_n_new, mask=is_out)
    tl.store(new_y + unit * M + head * D + outs, sigmoid(o) * c_new, mask=is_out)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def slstm_step_norm_kernel(  # type: ignore[no-untyped-def]  # as above
    tokens,
    new_y,
    norm,
    out_norm,
    ffn_norm,
    window,
    y,
    experts,
    residual,
    out,
    first,
    E,
    K,
    N,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    POW_H: tl.constexpr,
    POW_D: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Add the normalised cells' output to the token, normalise that; y, the window."""
    unit, expert, row = find_unit(experts, first, K, HAS_EXPERTS)
    if (expert < 0) | (expert >= E):
        return
    M: tl.constexpr = H * D
    h = tl.arange(0, POW_H)[:, None]
    d = tl.arange(0, POW_D)[None, :]
    channel = h * D + d
    valid = (h < H) & (d < D)
    memory = expert * N + row
    at_channel = expert * M + channel

    x = tl.load(tokens + row * M + channel, mask=valid, other=0.0).to(tl.float32)
    latest = tl.load(new_y + unit * M + channel, mask=valid, other=0.0)

    # The norm of each head's output
    mean = tl.sum(latest, 1)[:, None] / D
    centered = tl.where(valid, latest - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / D + eps)
    scale = tl.load(out_norm + at_channel, mask=valid, other=0.0).to(tl.float32)
    total = x + centered * inverse * scale
    tl.store(residual + unit * M + channel, total, mask=valid)

    mean = tl.sum(total) / M
    centered = tl.where(valid, total - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered) / M + eps)
    scale = tl.load(ffn_norm + at_channel, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + unit * M + channel, centered * inverse * scale, mask=valid)

    mean = tl.sum(x) / M
    centered = tl.where(valid, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered) / M + eps)
    scale = tl.load(norm + at_channel, mask=valid, other=0.0).to(tl.float32)
    latest_input = centered * inverse * scale

    at_window = window + memory * (TAPS - 1) * M + channel
    olds = ()
    for tap in tl.static_range(1, TAPS - 1):
        olds = olds + (tl.load(at_window + tap * M, mask=valid, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no starred tuples
    # All threads have read the old ones.
    tl.debug_barrier()
    for tap in tl.static_range(TAPS - 2):
        tl.store(at_window + tap * M, olds[tap], mask=valid)
    latest_input = latest_input.to(window.dtype.element_ty)
    tl.store(at_window + (TAPS - 2) * M, latest_input, mask=valid)
    tl.store(y + memory * M + channel, latest, mask=valid)
