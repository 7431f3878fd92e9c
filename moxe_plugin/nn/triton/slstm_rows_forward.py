"""The forward kernel of the sLSTM on ragged rows; see :mod:`.slstm_rows_tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.slstm_rows_tiles import columns, first_copy
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
def _merge_gates(i, f, z, o, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # The inverse of `_split_gates`
    x = tl.join(tl.join(i, z), tl.join(f, o))
    return tl.reshape(tl.permute(x, (2, 3, 0, 1)), (4 * SIZE, BLOCK_N))


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_inputs(base, plane, D: tl.constexpr, valid):  # type: ignore[no-untyped-def]  # as above
    i = tl.load(base, mask=valid, other=0.0)
    f = tl.load(base + D, mask=valid, other=0.0)
    z = tl.load(base + plane, mask=valid, other=0.0)
    o = tl.load(base + plane + D, mask=valid, other=0.0)
    return i, f, z, o


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


@triton.jit
def _advance(i, f, z, o, c, log_n):  # type: ignore[no-untyped-def]  # as above
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
    log_n = tl.maximum(log_kept, i) + LN_2 * tl.log2(1.0 + difference)
    c = c + w * (z - c)

    return w, not_f, z, o, c, log_n


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def slstm_forward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    begins,
    inputs,
    bias,
    weight,
    outputs,
    before,
    gates,
    cs,
    H,
    N,
    plane,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAVES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Run a head of some segments through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_segment = segments < N
    first = tl.load(begins + expert * N + segments, mask=is_segment, other=0)
    last = tl.load(begins + expert * N + segments + 1, mask=is_segment, other=0)
    lens = last - first
    first = first.to(tl.int64)
    num_steps = tl.max(lens)

    stack = (expert * H + head).to(tl.int64)
    element: tl.constexpr = weight.dtype.element_ty
    # R^T: rows (gate, output), columns inputs
    bodies = tl.arange(0, P)
    outs = tl.arange(0, 4 * P)
    # In (C,H,4,D), in (2,C,H,2,D)
    at_gate = outs // P * D + outs % P
    at_input = outs // (2 * P) * plane + outs // P % 2 * D + outs % P
    from_body = weight + stack * 4 * D * D + at_gate[:, None]
    r = tl.load(from_body + bodies[None, :] * (4 * D))
    biases = tl.load(bias + stack * 4 * D + at_gate).to(tl.float32)[:, None]

    c = tl.zeros((P, BLOCK_N), tl.float32)
    log_n = tl.full((P, BLOCK_N), -1e30, tl.float32)
    y = tl.zeros((P, BLOCK_N), tl.float32)
    valid = (lens > 0)[None, :]
    place = ((first * H + head) * D)[None, :]
    if SAVES:
        tl.store(before + place + bodies[:, None], y.to(element), mask=valid)
    next_x = tl.load(inputs + 2 * place + at_input[:, None], mask=valid, other=0.0)
    if Q > 0:
        tails = P + tl.arange(0, Q)
        outs_tail = tl.arange(0, 4 * Q)
        at_gate_tail = P + outs_tail // Q * D + outs_tail % Q
        r_tail = tl.load(from_body + tails[None, :] * (4 * D))
        from_tail = weight + stack * 4 * D * D + at_gate_tail[:, None]
        r_of_tail = tl.load(from_tail + bodies[None, :] * (4 * D))
        r_of_tail_tail = tl.load(from_tail + tails[None, :] * (4 * D))
        biases_tail = tl.load(bias + stack * 4 * D + at_gate_tail)
        biases_tail = biases_tail.to(tl.float32)[:, None]
        c_tail = tl.zeros((Q, BLOCK_N), tl.float32)
        log_n_tail = tl.full((Q, BLOCK_N), -1e30, tl.float32)
        y_tail = tl.zeros((Q, BLOCK_N), tl.float32)
        if SAVES:
            tl.store(before + place + tails[:, None], y_tail.to(element), mask=valid)
        next_i, next_f, next_z, next_o = _load_inputs(
            inputs + 2 * place + tails[:, None], plane, D, valid
        )

    # The interpreter takes no tensor as the end of a range.
    t = 0
    while t < num_steps:
        valid = (t < lens)[None, :]
        is_next = (t + 1 < lens)[None, :]
        place = (((first + t) * H + head) * D)[None, :]
        place_next = (((first + t + 1) * H + head) * D)[None, :]
        # Of the step to come, which arrives during this one
        from_inputs = next_x
        next_x = tl.load(
            inputs + 2 * place_next + at_input[:, None], mask=is_next, other=0.0
        )

        y_twice = columns(y, y, P, BLOCK_N, element)
        x = multiply(r, y_twice, INTERPRETED)
        if Q > 0:
            tail_twice = columns(y_tail, y_tail, Q, BLOCK_N, element)
            x += multiply(r_tail, tail_twice, INTERPRETED)
            x_tail = multiply(r_of_tail, y_twice, INTERPRETED)
            x_tail += multiply(r_of_tail_tail, tail_twice, INTERPRETED)
            x_tail = _once(x_tail, 4 * Q, BLOCK_N) + biases_tail
            i, f, z, o = _split_gates(x_tail, Q, BLOCK_N)
            i += next_i.to(tl.float32)
            f += next_f.to(tl.float32)
            z += next_z.to(tl.float32)
            o += next_o.to(tl.float32)
            next_i, next_f, next_z, next_o = _load_inputs(
                inputs + 2 * place_next + tails[:, None], plane, D, is_next
            )
            w, not_f, z, o, c_tail, log_n_tail = _advance(
                i, f, z, o, c_tail, log_n_tail
            )
            y_tail = o * c_tail
            at = place + tails[:, None]
            tl.store(outputs + at, y_tail.to(element), mask=valid)
            if SAVES:
                tl.store(before + at + H * D, y_tail.to(element), mask=is_next)
                tl.store(cs + at, c_tail, mask=valid)
                at_tail = gates + 4 * place + tails[:, None]
                tl.store(at_tail, w, mask=valid)
                tl.store(at_tail + D, not_f, mask=valid)
                tl.store(at_tail + 2 * D, z, mask=valid)
                tl.store(at_tail + 3 * D, o, mask=valid)

        x = _once(x, 4 * P, BLOCK_N) + biases + from_inputs.to(tl.float32)
        i, f, z, o = _split_gates(x, P, BLOCK_N)
        w, not_f, z, o, c, log_n = _advance(i, f, z, o, c, log_n)
        y = o * c
        at_body = place + bodies[:, None]
        tl.store(outputs + at_body, y.to(element), mask=valid)
        if SAVES:
            tl.store(before + at_body + H * D, y.to(element), mask=is_next)
            tl.store(cs + at_body, c, mask=valid)
            merged = _merge_gates(w, not_f, z, o, P, BLOCK_N)
            tl.store(gates + 4 * place + at_gate[:, None], merged, mask=valid)
        t += 1
