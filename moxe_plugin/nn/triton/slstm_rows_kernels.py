"""The kernels of :mod:`moxe_plugin.nn.triton.slstm_rows`: R stays on chip.

A program takes one head of one expert and 8 of its segments through all steps. R, at
Table 1 size 160 * 640 * 2 bytes = 205 kB in bfloat16, fits into the 227 kB of shared
memory that a program may have on an H100: it is the left factor of each product, loaded
before the loop, and the outputs of the step before are the right one. So a product is
``(gates, D) (D, segments)``: what stands in rows elsewhere stands in columns here.

Tiles are powers of two, and D = 160 is 128 + 32: P channels, the *body*, and Q more,
the *tail* (Q = 0 if D is a power of two). Nothing is padded, or R would not fit.

Backward, dy is the sum over gates of ``R_g dg``. Its Q channels of the tail would be
less than the 64 rows that the tensor cores take. Gates come in pairs instead: columns
of the right factor are ``(segment, half)``, half 0 being i or f and half 1 being z or
o; the rows of the tail are ``(half, channel)``, and what has two different halves is
not used. As a product is bound by reading R, twice the columns cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(r, x, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's arguments have no type
    # The interpreter multiplies the bits of bfloat16; float32 holds the same products.
    if WIDE:
        return tl.dot(r.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(r, x)


@triton.jit
def _multiply_twice(
    r, y, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):  # type: ignore[no-untyped-def]  # as above
    # The tensor cores take 8 columns, but Triton gives them no fewer than 16.
    twice = tl.reshape(tl.join(y, y), (y.shape[0], 2 * BLOCK_N))
    product, _ = tl.split(tl.reshape(_multiply(r, twice, WIDE), (SIZE, BLOCK_N, 2)))
    return product


@triton.jit
def _gate_tile(outs, OUT: tl.constexpr, ins, D: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Where R^T of some gates is: rows (gate, output), columns inputs
    return ((outs // OUT) * D + outs % OUT)[:, None] + ins[None, :] * (4 * D)


@triton.jit
def _part(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # (2*SIZE,N), gate by gate -> two of (SIZE,N)
    return tl.split(tl.permute(tl.reshape(x, (2, SIZE, BLOCK_N)), (1, 2, 0)))


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]  # as above
    # Of the exponents only those that cannot overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _advance(i, f, z, o, c, log_n):  # type: ignore[no-untyped-def]  # as above
    # The cell of one step, as in moxe_plugin.nn.slstm_cell
    small = tl.exp(-tl.abs(f))
    log_kept = tl.minimum(f, 0.0) - tl.log(1.0 + small) + log_n
    not_f = tl.where(f >= 0, small, 1.0) / (1.0 + small)
    difference = tl.exp(-tl.abs(i - log_kept))
    w = tl.where(i >= log_kept, 1.0, difference) / (1.0 + difference)
    z = 2.0 * _sigmoid(2.0 * z) - 1.0
    o = _sigmoid(o)
    log_n = tl.maximum(log_kept, i) + tl.log(1.0 + difference)
    c = c + w * (z - c)

    return w, not_f, z, o, c, log_n


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    begins,
    gates_if,
    gates_zo,
    bias,
    weight,
    outputs,
    before,
    pairs,
    cs,
    H,
    N,
    stride_if,
    stride_zo,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAVES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Run a head of 8 segments through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_segment = segments < N
    at = begins + expert * N + segments
    first = tl.load(at, mask=is_segment, other=0)
    lens = tl.load(at + 1, mask=is_segment, other=0) - first
    first = first.to(tl.int64)
    num_steps = tl.max(lens)

    stack = (expert * H + head).to(tl.int64)
    element = weight.dtype.element_ty
    base = weight + stack * 4 * D * D
    bodies, gate_bodies = tl.arange(0, P), tl.arange(0, 2 * P)
    r_if = tl.load(base + _gate_tile(gate_bodies, P, bodies, D))
    r_zo = tl.load(base + 2 * D + _gate_tile(gate_bodies, P, bodies, D))
    gate_at = (gate_bodies // P) * D + gate_bodies % P
    biases = bias + stack * 4 * D + gate_at
    bias_if = tl.load(biases).to(tl.float32)[:, None]
    bias_zo = tl.load(biases + 2 * D).to(tl.float32)[:, None]

    c = tl.zeros((P, BLOCK_N), tl.float32)
    log_n = tl.full((P, BLOCK_N), -1e30, tl.float32)
    y = tl.zeros((P, BLOCK_N), element)
    if Q > 0:
        tails, gate_tails = P + tl.arange(0, Q), tl.arange(0, 2 * Q)
        r_if_tail = tl.load(base + _gate_tile(gate_bodies, P, tails, D))
        r_zo_tail = tl.load(base + 2 * D + _gate_tile(gate_bodies, P, tails, D))
        r_tail = tl.load(base + P + _gate_tile(tl.arange(0, 4 * Q), Q, bodies, D))
        r_tail_tail = tl.load(base + P + _gate_tile(tl.arange(0, 4 * Q), Q, tails, D))
        gate_at_tail = P + (gate_tails // Q) * D + gate_tails % Q
        biases = bias + stack * 4 * D + gate_at_tail
        bias_if_tail = tl.load(biases).to(tl.float32)[:, None]
        bias_zo_tail = tl.load(biases + 2 * D).to(tl.float32)[:, None]
        c_tail = tl.zeros((Q, BLOCK_N), tl.float32)
        log_n_tail = tl.full((Q, BLOCK_N), -1e30, tl.float32)
        y_tail = tl.zeros((Q, BLOCK_N), element)

    from_if = gates_if + first * stride_if + head * 2 * D
    from_zo = gates_zo + first * stride_zo + head * 2 * D
    valid = (lens > 0)[None, :]
    next_if = tl.load(from_if[None, :] + gate_at[:, None], mask=valid, other=0.0)
    next_zo = tl.load(from_zo[None, :] + gate_at[:, None], mask=valid, other=0.0)
    if Q > 0:
        next_if_tail = tl.load(
            from_if[None, :] + gate_at_tail[:, None], mask=valid, other=0.0
        )
        next_zo_tail = tl.load(
            from_zo[None, :] + gate_at_tail[:, None], mask=valid, other=0.0
        )

    # The interpreter takes no tensor as the end of a range.
    t = 0
    while t < num_steps:
        valid = (t < lens)[None, :]
        x_if = next_if.to(tl.float32) + bias_if
        x_zo = next_zo.to(tl.float32) + bias_zo
        # What the next step reads arrives during this one.
        from_if += stride_if
        from_zo += stride_zo
        is_next = (t + 1 < lens)[None, :]
        next_if = tl.load(from_if[None, :] + gate_at[:, None], mask=is_next, other=0.0)
        next_zo = tl.load(from_zo[None, :] + gate_at[:, None], mask=is_next, other=0.0)

        row = first + t
        place = (row * H + head)[None, :] * D
        if SAVES:
            tl.store(before + place + bodies[:, None], y, mask=valid)

        x_if += _multiply_twice(r_if, y, 2 * P, BLOCK_N, WIDE)
        x_zo += _multiply_twice(r_zo, y, 2 * P, BLOCK_N, WIDE)
        if Q > 0:
            x_if_tail = next_if_tail.to(tl.float32) + bias_if_tail
            x_zo_tail = next_zo_tail.to(tl.float32) + bias_zo_tail
            next_if_tail = tl.load(
                from_if[None, :] + gate_at_tail[:, None], mask=is_next, other=0.0
            )
            next_zo_tail = tl.load(
                from_zo[None, :] + gate_at_tail[:, None], mask=is_next, other=0.0
            )
            if SAVES:
                tl.store(before + place + tails[:, None], y_tail, mask=valid)
            x_if += _multiply_twice(r_if_tail, y_tail, 2 * P, BLOCK_N, WIDE)
            x_zo += _multiply_twice(r_zo_tail, y_tail, 2 * P, BLOCK_N, WIDE)
            x_tail = _multiply_twice(r_tail, y, 4 * Q, BLOCK_N, WIDE) + _multiply_twice(
                r_tail_tail, y_tail, 4 * Q, BLOCK_N, WIDE
            )
            # (4*Q,N) -> (2,Q*N…) twice: first the pair of gates, then the gate
            halves = tl.permute(tl.reshape(x_tail, (2, 2, Q, BLOCK_N)), (2, 3, 1, 0))
            if_tail, zo_tail = tl.split(halves)
            i, f = tl.split(if_tail)
            z, o = tl.split(zo_tail)
            i_in, f_in = _part(x_if_tail, Q, BLOCK_N)
            z_in, o_in = _part(x_zo_tail, Q, BLOCK_N)
            w, not_f, z, o, c_new, log_n_new = _advance(
                i + i_in, f + f_in, z + z_in, o + o_in, c_tail, log_n_tail
            )
            c_tail = tl.where(valid, c_new, c_tail)
            log_n_tail = tl.where(valid, log_n_new, log_n_tail)
            output = o * c_new
            y_tail = output.to(element)
            tl.store(outputs + place + tails[:, None], output, mask=valid)
            if SAVES:
                tl.store(cs + place + tails[:, None], c_new, mask=valid)
                pair = pairs + 4 * place + 2 * tails[:, None]
                pair = pair[:, :, None] + tl.arange(0, 2)[None, None, :]
                tl.store(pair, tl.join(w, z), mask=valid[:, :, None])
                tl.store(pair + 2 * D, tl.join(not_f, o), mask=valid[:, :, None])

        i, f = _part(x_if, P, BLOCK_N)
        z, o = _part(x_zo, P, BLOCK_N)
        w, not_f, z, o, c_new, log_n_new = _advance(i, f, z, o, c, log_n)
        c = tl.where(valid, c_new, c)
        log_n = tl.where(valid, log_n_new, log_n)
        output = o * c_new
        y = output.to(element)
        tl.store(outputs + place + bodies[:, None], output, mask=valid)
        if SAVES:
            tl.store(cs + place + bodies[:, None], c_new, mask=valid)
            pair = pairs + 4 * place + 2 * bodies[:, None]
            pair = pair[:, :, None] + tl.arange(0, 2)[None, None, :]
            tl.store(pair, tl.join(w, z), mask=valid[:, :, None])
            tl.store(pair + 2 * D, tl.join(not_f, o), mask=valid[:, :, None])
        t += 1


@triton.jit
def _retreat(grad_y, dh, grad_c, grad_log_n, w, z, not_f, o, c, c_old):  # type: ignore[no-untyped-def]  # as above
    # The gradients of one step; all that is loaded is 0 where a segment has ended.
    total_y = grad_y + dh
    total_c = grad_c + total_y * o
    d_i = total_c * w * (1.0 - w) * (z - c_old) + grad_log_n * w
    grad_log_n -= d_i
    d_f = grad_log_n * not_f
    d_z = total_c * w * (1.0 - z * z)
    d_o = total_y * c * o * (1.0 - o)
    grad_c = total_c * (1.0 - w)

    return d_i, d_f, d_z, d_o, grad_c, grad_log_n


@triton.jit
def _columns(x, y, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Two of (SIZE,N) -> (SIZE,N*2)
    return tl.reshape(tl.join(x, y), (SIZE, 2 * BLOCK_N))


@triton.jit
def _own_half(x, y, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Half 0 of x and half 1 of y, (SIZE,N*2) each, summed
    own, _ = tl.split(tl.reshape(x, (SIZE, BLOCK_N, 2)))
    _, other = tl.split(tl.reshape(y, (SIZE, BLOCK_N, 2)))
    return own + other


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    begins,
    weight,
    pairs,
    cs,
    grad_outputs,
    grad_if,
    grad_zo,
    grad_bias,
    H,
    N,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Run a head of 8 segments back through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_segment = segments < N
    first = tl.load(begins + expert * N + segments, mask=is_segment, other=0)
    last = tl.load(begins + expert * N + segments + 1, mask=is_segment, other=0)
    lens = last - first
    first = first.to(tl.int64)

    stack = (expert * H + head).to(tl.int64)
    element = weight.dtype.element_ty
    bodies, halves = tl.arange(0, P), tl.arange(0, 2)
    base = weight + stack * 4 * D * D
    # R, rows inputs: of i, f, z and o
    r = base + bodies[:, None] * (4 * D) + bodies[None, :]
    r_i, r_f = tl.load(r), tl.load(r + D)
    r_z, r_o = tl.load(r + 2 * D), tl.load(r + 3 * D)
    zeros = tl.zeros((P, BLOCK_N), tl.float32)
    grad_c, grad_log_n, grad_y = zeros, zeros, zeros
    sum_i, sum_f, sum_z, sum_o = zeros, zeros, zeros, zeros

    t = tl.max(lens) - 1
    row = first + t
    place = (row * H + head) * D
    valid = ((t >= 0) & (t < lens))[None, :]
    has_old = ((t > 0) & (t - 1 < lens))[None, :]
    at_body = place[None, :] + bodies[:, None]
    at_pair = (4 * place[None, :] + 2 * bodies[:, None])[:, :, None] + halves
    next_dh = tl.load(grad_outputs + at_body, mask=valid, other=0.0)
    next_wz = tl.load(pairs + at_pair, mask=valid[:, :, None], other=0.0)
    next_fo = tl.load(pairs + at_pair + 2 * D, mask=valid[:, :, None], other=0.0)
    next_c = tl.load(cs + at_body, mask=valid, other=0.0)
    next_c_old = tl.load(cs + at_body - H * D, mask=has_old, other=0.0)
    if Q > 0:
        tails = P + tl.arange(0, Q)
        # The tail's inputs of the gates: (gate, output) in pairs (i, f), (z, o)
        gate_tails = tl.arange(0, 2 * Q)
        at_gate_tail = P + (gate_tails // Q) * D + gate_tails % Q
        r = base + bodies[:, None] * (4 * D) + at_gate_tail[None, :]
        r_if_tail, r_zo_tail = tl.load(r), tl.load(r + 2 * D)
        # The tail's rows (half, input): of i and z, of f and o
        ins = P + gate_tails % Q
        r = base + (ins * 4 * D + (gate_tails // Q) * 2 * D)[:, None]
        r_tail_iz = tl.load(r + bodies[None, :])
        r_tail_fo = tl.load(r + D + bodies[None, :])
        r_tail_tail = tl.load(r + at_gate_tail[None, :])
        zeros = tl.zeros((Q, BLOCK_N), tl.float32)
        grad_c_tail, grad_log_n_tail, grad_y_tail = zeros, zeros, zeros
        sum_i_tail, sum_f_tail, sum_z_tail, sum_o_tail = zeros, zeros, zeros, zeros
        at_tail = place[None, :] + tails[:, None]
        at_pair_tail = (4 * place[None, :] + 2 * tails[:, None])[:, :, None] + halves
        next_dh_tail = tl.load(grad_outputs + at_tail, mask=valid, other=0.0)
        next_wz_tail = tl.load(pairs + at_pair_tail, mask=valid[:, :, None], other=0.0)
        next_fo_tail = tl.load(
            pairs + at_pair_tail + 2 * D, mask=valid[:, :, None], other=0.0
        )
        next_c_tail = tl.load(cs + at_tail, mask=valid, other=0.0)
        next_c_old_tail = tl.load(cs + at_tail - H * D, mask=has_old, other=0.0)

    while t >= 0:
        valid = (t < lens)[None, :]
        # (C,H,2,D), gate first
        at_gate = ((first + t) * H + head)[None, :] * (2 * D)
        w, z = tl.split(next_wz)
        not_f, o = tl.split(next_fo)
        dh, c, c_old = next_dh, next_c, next_c_old
        # What the next step reads arrives during this one.
        is_next = ((t > 0) & (t - 1 < lens))[None, :]
        has_old = ((t > 1) & (t - 2 < lens))[None, :]
        place -= H * D
        at_body = place[None, :] + bodies[:, None]
        at_pair = (4 * place[None, :] + 2 * bodies[:, None])[:, :, None] + halves
        next_dh = tl.load(grad_outputs + at_body, mask=is_next, other=0.0)
        next_wz = tl.load(pairs + at_pair, mask=is_next[:, :, None], other=0.0)
        next_fo = tl.load(pairs + at_pair + 2 * D, mask=is_next[:, :, None], other=0.0)
        next_c = c_old
        next_c_old = tl.load(cs + at_body - H * D, mask=has_old, other=0.0)

        d_i, d_f, d_z, d_o, grad_c, grad_log_n = _retreat(
            grad_y, dh, grad_c, grad_log_n, w, z, not_f, o, c, c_old
        )
        sum_i += d_i
        sum_f += d_f
        sum_z += d_z
        sum_o += d_o
        d_i, d_f, d_z, d_o = (
            d_i.to(element),
            d_f.to(element),
            d_z.to(element),
            d_o.to(element),
        )
        of_gate = at_gate + bodies[:, None]
        tl.store(grad_if + of_gate, d_i, mask=valid)
        tl.store(grad_if + of_gate + D, d_f, mask=valid)
        tl.store(grad_zo + of_gate, d_z, mask=valid)
        tl.store(grad_zo + of_gate + D, d_o, mask=valid)
        iz = _columns(d_i, d_z, P, BLOCK_N)
        fo = _columns(d_f, d_o, P, BLOCK_N)
        dy_if = _multiply(r_i, iz, WIDE) + _multiply(r_f, fo, WIDE)
        dy_zo = _multiply(r_z, iz, WIDE) + _multiply(r_o, fo, WIDE)

        if Q > 0:
            w, z = tl.split(next_wz_tail)
            not_f, o = tl.split(next_fo_tail)
            dh, c, c_old = next_dh_tail, next_c_tail, next_c_old_tail
            at_tail = place[None, :] + tails[:, None]
            at_pair_tail = (4 * place[None, :] + 2 * tails[:, None])[
                :, :, None
            ] + halves
            next_dh_tail = tl.load(grad_outputs + at_tail, mask=is_next, other=0.0)
            next_wz_tail = tl.load(
                pairs + at_pair_tail, mask=is_next[:, :, None], other=0.0
            )
            next_fo_tail = tl.load(
                pairs + at_pair_tail + 2 * D, mask=is_next[:, :, None], other=0.0
            )
            next_c_tail = c_old
            next_c_old_tail = tl.load(cs + at_tail - H * D, mask=has_old, other=0.0)

            d_i_tail, d_f_tail, d_z_tail, d_o_tail, grad_c_tail, grad_log_n_tail = (
                _retreat(
                    grad_y_tail,
                    dh,
                    grad_c_tail,
                    grad_log_n_tail,
                    w,
                    z,
                    not_f,
                    o,
                    c,
                    c_old,
                )
            )
            sum_i_tail += d_i_tail
            sum_f_tail += d_f_tail
            sum_z_tail += d_z_tail
            sum_o_tail += d_o_tail
            d_i_tail, d_f_tail, d_z_tail, d_o_tail = (
                d_i_tail.to(element),
                d_f_tail.to(element),
                d_z_tail.to(element),
                d_o_tail.to(element),
            )
            of_tail = at_gate + tails[:, None]
            tl.store(grad_if + of_tail, d_i_tail, mask=valid)
            tl.store(grad_if + of_tail + D, d_f_tail, mask=valid)
            tl.store(grad_zo + of_tail, d_z_tail, mask=valid)
            tl.store(grad_zo + of_tail + D, d_o_tail, mask=valid)
            # (Q,N*2) twice -> ((gate, output),N*2)
            both = tl.join(
                _columns(d_i_tail, d_z_tail, Q, BLOCK_N),
                _columns(d_f_tail, d_o_tail, Q, BLOCK_N),
            )
            both = tl.reshape(tl.permute(both, (2, 0, 1)), (2 * Q, 2 * BLOCK_N))
            dy_if += _multiply(r_if_tail, both, WIDE)
            dy_zo += _multiply(r_zo_tail, both, WIDE)
            dy_tail = (
                _multiply(r_tail_iz, iz, WIDE)
                + _multiply(r_tail_fo, fo, WIDE)
                + _multiply(r_tail_tail, both, WIDE)
            )
            # ((half, input),(segment, half)) -> own halves
            dy_tail = tl.reshape(dy_tail, (2, Q, 2 * BLOCK_N))
            first_half, second_half = tl.split(tl.permute(dy_tail, (1, 2, 0)))
            grad_y_tail = _own_half(first_half, second_half, Q, BLOCK_N)

        grad_y = _own_half(dy_if, dy_zo, P, BLOCK_N)
        t -= 1

    # In a tensor of shape (E,H,blocks,4,D)
    at = (stack * tl.num_programs(0) + tl.program_id(0)) * 4 * D
    at_bias = grad_bias + at + bodies
    tl.store(at_bias, tl.sum(sum_i, 1))
    tl.store(at_bias + D, tl.sum(sum_f, 1))
    tl.store(at_bias + 2 * D, tl.sum(sum_z, 1))
    tl.store(at_bias + 3 * D, tl.sum(sum_o, 1))
    if Q > 0:
        at_bias = grad_bias + at + tails
        tl.store(at_bias, tl.sum(sum_i_tail, 1))
        tl.store(at_bias + D, tl.sum(sum_f_tail, 1))
        tl.store(at_bias + 2 * D, tl.sum(sum_z_tail, 1))
        tl.store(at_bias + 3 * D, tl.sum(sum_o_tail, 1))
