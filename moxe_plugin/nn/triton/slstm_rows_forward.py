"""The forward kernel of the sLSTM on ragged rows; see :mod:`.slstm_rows_tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.slstm_rows_tiles import (
    columns,
    find_segments,
    find_states,
    first_copy,
    load_states,
    store_states,
)
from moxe_plugin.nn.triton.tile_access import (
    fetch_ahead,
    load_here,
    store_four_here,
    store_here,
)
from moxe_plugin.nn.triton.tile_products import multiply


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _split_gates(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's arguments have no type
    # (4*SIZE,N), gate by gate -> four of (SIZE,N)
    x = tl.permute(tl.reshape(x, (2, 2, SIZE, BLOCK_N)), (2, 3, 1, 0))
    first, second = tl.split(x)
    i, f = tl.split(first)
    z, o = tl.split(second)
    return i, f, z, o


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _split_pair(x, SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Rows (channel // 8, gate, channel % 8) -> two of (SIZE,N), of columns that are
    # there twice
    x = tl.reshape(x, (SIZE // 8, 2, 8, COLUMNS, 2))
    x = tl.reshape(tl.permute(x, (0, 2, 3, 1, 4)), (SIZE, COLUMNS, 2, 2))
    once, _ = tl.split(x)
    return tl.split(once)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_inputs(  # type: ignore[no-untyped-def]  # as above
    inputs_if, inputs_zo, at, D: tl.constexpr, valid, INTERPRETED: tl.constexpr
):
    i = load_here(inputs_if + at, valid, INTERPRETED)
    f = load_here(inputs_if + at + D, valid, INTERPRETED)
    z = load_here(inputs_zo + at, valid, INTERPRETED)
    o = load_here(inputs_zo + at + D, valid, INTERPRETED)
    return i, f, z, o


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_step(  # type: ignore[no-untyped-def]  # as above
    at,
    stride,
    y,
    c,
    w,
    not_f,
    z,
    o,
    outputs,
    before,
    gates,
    cs,
    valid,
    is_next,
    SAVES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    store_here(outputs + at, y, valid, INTERPRETED)
    if SAVES:
        # What the next step is multiplied with
        store_here(before + at + stride, y, is_next, INTERPRETED)
        store_here(cs + at, c, valid, INTERPRETED)
        # Into a tensor (C,H,D,4)
        store_four_here(gates + 4 * at, w, not_f, z, o, valid, INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _once(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Of columns that are there twice, (SIZE,N*2) -> (SIZE,N)
    x = first_copy(x, SIZE, BLOCK_N)
    x, _ = tl.split(tl.reshape(x, (SIZE, BLOCK_N, 2)))
    return x


@triton.jit
def _inverse(x):  # type: ignore[no-untyped-def]  # as above
    # Of 1 to 2, where a division would look for more than there is
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]  # as above
    # Of the exponents only those that cannot overflow.
    small = tl.exp(-tl.abs(x))
    inverse = _inverse(1.0 + small)
    return tl.where(x >= 0, inverse, small * inverse)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _advance(i, f, z, o, c, log_n, y, valid, KEEPS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # The cell of one step, as in moxe_plugin.nn.slstm_cell; of base 2, logarithms take
    # the fewest instructions
    LN_2: tl.constexpr = 0.6931471805599453
    small = tl.exp(-tl.abs(f))
    log_kept = tl.minimum(f, 0.0) - LN_2 * tl.log2(1.0 + small) + log_n
    not_f = tl.where(f >= 0, small, 1.0) * _inverse(1.0 + small)
    difference = tl.exp(-tl.abs(i - log_kept))
    w = tl.where(i >= log_kept, 1.0, difference) * _inverse(1.0 + difference)
    z = 2.0 * _sigmoid(2.0 * z) - 1.0
    o = _sigmoid(o)
    log_n_after = tl.maximum(log_kept, i) + LN_2 * tl.log2(1.0 + difference)
    c_after = c + w * (z - c)
    y_after = o * c_after
    if KEEPS:
        c_after = tl.where(valid, c_after, c)
        log_n_after = tl.where(valid, log_n_after, log_n)
        y_after = tl.where(valid, y_after, y)

    return w, not_f, z, o, c_after, log_n_after, y_after


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def slstm_forward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    bounds,
    inputs_if,
    inputs_zo,
    bias,
    weight,
    first_c,
    first_log_n,
    first_y,
    outputs,
    before,
    gates,
    cs,
    last_c,
    last_log_n,
    last_y,
    H,
    N,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
    SAVES: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Run a head of some segments through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    first, lens = find_segments(bounds, expert, N, STEP, BLOCK_N, BLOCK_N)
    num_steps = tl.max(lens)

    stack = (expert * H + head).to(tl.int64)
    element: tl.constexpr = weight.dtype.element_ty
    # R^T: rows (gate, output), columns inputs
    bodies = tl.arange(0, P)
    outs = tl.arange(0, 4 * P)
    # Where they are in a tensor (E,H,D,4,D), or (E,H,4,D)
    at_gate = outs // P * D + outs % P
    from_body = weight + stack * 4 * D * D + at_gate[:, None]
    r = tl.load(from_body + bodies[None, :] * (4 * D))
    biases = tl.load(bias + stack * 4 * D + at_gate).to(tl.float32)[:, None]

    at_state, is_state = find_states(expert, head, H, N, D, BLOCK_N, BLOCK_N)
    at_state += bodies[:, None]
    c, log_n, y = load_states(
        *(first_c, first_log_n, first_y, at_state, is_state, P, BLOCK_N, -1e30),
        *(HAS_MEMORY, INTERPRETED),
    )
    is_first = (lens > 0)[None, :]
    begin = ((first * H + head) * D)[None, :]
    if SAVES:
        tl.store(before + begin + bodies[:, None], y.to(element), mask=is_first)
    if Q > 0:
        tails = P + tl.arange(0, Q)
        outs_tail = tl.arange(0, 2 * Q)
        # Rows (pair, channel // 8, gate of the pair, channel % 8): where the tensor
        # cores leave the sums, a channel's four gates are with one thread then.
        at_gate_tail = P + outs_tail // 8 % 2 * D + outs_tail // 16 * 8 + outs_tail % 8
        r_tail = tl.load(from_body + tails[None, :] * (4 * D))
        from_tail = weight + stack * 4 * D * D + at_gate_tail[:, None]
        r_if = tl.load(from_tail + bodies[None, :] * (4 * D))
        r_if_tail = tl.load(from_tail + tails[None, :] * (4 * D))
        r_zo = tl.load(from_tail + bodies[None, :] * (4 * D) + 2 * D)
        r_zo_tail = tl.load(from_tail + tails[None, :] * (4 * D) + 2 * D)
        biases_tail = bias + stack * 4 * D + at_gate_tail
        biases_if = tl.load(biases_tail).to(tl.float32)[:, None]
        biases_zo = tl.load(biases_tail + 2 * D).to(tl.float32)[:, None]
        first_tail, lens_tail = find_segments(bounds, expert, N, STEP, BLOCK_N, 8)
        at_state_tail, has_state_tail = find_states(expert, head, H, N, D, BLOCK_N, 8)
        at_state_tail += tails[:, None]
        c_tail, log_n_tail, y_tail = load_states(
            *(first_c, first_log_n, first_y, at_state_tail, has_state_tail),
            *(Q, 8, -1e30, HAS_MEMORY, INTERPRETED),
        )
        if SAVES:
            begin = ((first_tail * H + head) * D)[None, :]
            is_first = (lens_tail > 0)[None, :]
            tl.store(before + begin + tails[:, None], y_tail.to(element), mask=is_first)

    # Lines of 64 elements with a head's i and f, or z and o, of a step
    lines = tl.arange(0, LINES)
    at_line = lines % (LINES // 2) * 64
    is_line = (at_line < 2 * D)[:, None]
    from_line = tl.where(lines < LINES // 2, inputs_if, inputs_zo) + at_line
    from_line = from_line[:, None]

    # The interpreter takes no tensor as the end of a range.
    t = 0
    while t < num_steps:
        valid = (t < lens)[None, :]
        is_next = (t + 1 < lens)[None, :]
        place = (((first + t) * H + head) * D)[None, :]
        fetch_ahead(
            from_line + 2 * place + 2 * H * D * AHEAD,
            is_line & (t + AHEAD < lens)[None, :],
            INTERPRETED,
        )
        at_body = place + bodies[:, None]
        in_i, in_f, in_z, in_o = _load_inputs(
            inputs_if, inputs_zo, place + at_body, D, valid, INTERPRETED
        )
        y_twice = columns(y, y, P, BLOCK_N, element)
        if Q > 0:
            valid_tail = (t < lens_tail)[None, :]
            is_next_tail = (t + 1 < lens_tail)[None, :]
            place_tail = (((first_tail + t) * H + head) * D)[None, :]
            at_tail = place_tail + tails[:, None]
            tail_i, tail_f, tail_z, tail_o = _load_inputs(
                inputs_if, inputs_zo, place_tail + at_tail, D, valid_tail, INTERPRETED
            )
            tail_twice = columns(y_tail, y_tail, Q, 8, element)
            x_if = multiply(r_if, y_twice, INTERPRETED)
            x_if_tail = multiply(r_if_tail, tail_twice, INTERPRETED)
            x_zo = multiply(r_zo, y_twice, INTERPRETED)
            x_zo_tail = multiply(r_zo_tail, tail_twice, INTERPRETED)
        x = multiply(r, y_twice, INTERPRETED)
        if Q > 0:
            x = multiply(r_tail, tail_twice, INTERPRETED, total=x)

            i, f = _split_pair(x_if + biases_if, Q, 8)
            z, o = _split_pair(x_zo + biases_zo, Q, 8)
            # Not one sum of both products: Triton would chain them, and chained they
            # have another layout.
            more_i, more_f = _split_pair(x_if_tail, Q, 8)
            more_z, more_o = _split_pair(x_zo_tail, Q, 8)
            w, not_f, z, o, c_tail, log_n_tail, y_tail = _advance(
                *(i + (more_i + tail_i), f + (more_f + tail_f)),
                *(z + (more_z + tail_z), o + (more_o + tail_o)),
                *(c_tail, log_n_tail, y_tail, valid_tail, HAS_MEMORY),
            )
            _store_step(
                *(at_tail, H * D, y_tail, c_tail, w, not_f, z, o),
                *(outputs, before, gates, cs, valid_tail, is_next_tail),
                *(SAVES, INTERPRETED),
            )

        x = _once(x, 4 * P, BLOCK_N) + biases
        i, f, z, o = _split_gates(x, P, BLOCK_N)
        w, not_f, z, o, c, log_n, y = _advance(
            *(i + in_i, f + in_f, z + in_z, o + in_o, c, log_n, y),
            *(valid, HAS_MEMORY),
        )
        _store_step(
            *(at_body, H * D, y, c, w, not_f, z, o, outputs, before, gates, cs),
            *(valid, is_next, SAVES, INTERPRETED),
        )
        t += 1

    store_states(
        *(last_c, last_log_n, last_y, at_state, c, log_n, y, is_state),
        *(HAS_MEMORY, INTERPRETED),
    )
    if Q > 0:
        store_states(
            *(last_c, last_log_n, last_y, at_state_tail, c_tail, log_n_tail, y_tail),
            *(has_state_tail, HAS_MEMORY, INTERPRETED),
        )
