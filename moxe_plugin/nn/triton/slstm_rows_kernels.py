"""The kernels of :mod:`moxe_plugin.nn.triton.slstm_rows`: R stays on chip.

A program takes one head of one expert and some of its segments through all steps. R, at
Table 1 size 160 * 640 * 2 bytes = 205 kB in bfloat16, fits into the 227 kB of shared
memory that a program may have on an H100: it is the left factor of each product, loaded
before the loop, and the outputs of the step before are the right one. So a product is
``(gates, D) (D, segments)``: what stands in rows elsewhere stands in columns here.

Tiles are powers of two, and D = 160 is 128 + 32: P channels, the *body*, and Q more,
the *tail* (Q = 0 if D is a power of two). Nothing is padded, or R would not fit.

Backward, dy is the sum over gates of ``R_g dg``. Its Q channels of the tail would be
less than the 64 rows that the tensor cores take. Gates come in pairs instead: columns
of the right factor are ``(segment, half)``, half 0 being i or f and half 1 being z or
o; rows are ``(half, channel)``, and what has two different halves is not used. As a
product is bound by reading R, twice the columns cost nothing.

What takes the time of a step is latency: waits for products, and tensors that go from
the threads that have them to those that store them, through shared memory. So products
are few and large, what is stored for the backward pass is one tensor, and where things
are is computed from what does not change: a vector of places that does would go from
thread to thread at each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _multiply(r, x, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's arguments have no type
    # The interpreter multiplies the bits of bfloat16; float32 holds the same products.
    if WIDE:
        return tl.dot(r.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(r, x)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _columns(x, y, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, element: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Two of (SIZE,N) -> (SIZE,N*2); of 4 segments all columns again: the tensor cores
    # take 8, but Triton gives them no fewer than 16. Rounded last: else Triton 3.5 and
    # 3.6 put what has three dimensions into shared memory, in a layout that they do not
    # have.
    both = tl.reshape(tl.join(x, y), (SIZE, 2 * BLOCK_N))
    if BLOCK_N == 4:
        both = tl.reshape(tl.permute(tl.join(both, both), (0, 2, 1)), (SIZE, 16))
    return both.to(element)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _first_copy(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # What `_columns` made of 4 segments is there twice.
    if BLOCK_N == 4:
        x, _ = tl.split(tl.permute(tl.reshape(x, (SIZE, 2, 2 * BLOCK_N)), (0, 2, 1)))
    return x


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _split_gates(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
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


@triton.jit
def _load_four(base, step, valid):  # type: ignore[no-untyped-def]  # as above
    # Of few channels, each gate by itself goes to fewer threads than all at once.
    i = tl.load(base, mask=valid, other=0.0)
    f = tl.load(base + step, mask=valid, other=0.0)
    z = tl.load(base + 2 * step, mask=valid, other=0.0)
    o = tl.load(base + 3 * step, mask=valid, other=0.0)
    return i, f, z, o


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
    x = _first_copy(x, SIZE, BLOCK_N)
    x, _ = tl.split(tl.reshape(x, (SIZE, BLOCK_N, 2)))
    return x


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _own_half(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # ((half, SIZE),(N, half)) -> (SIZE,N), the sum of both halves' own
    x = _first_copy(x, 2 * SIZE, BLOCK_N)
    x = tl.permute(tl.reshape(x, (2, SIZE, BLOCK_N, 2)), (1, 2, 3, 0))
    first, second = tl.split(x)
    own, _ = tl.split(first)
    _, other = tl.split(second)
    return own + other


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
    WIDE: tl.constexpr,
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

        y_twice = _columns(y, y, P, BLOCK_N, element)
        x = _multiply(r, y_twice, WIDE)
        if Q > 0:
            tail_twice = _columns(y_tail, y_tail, Q, BLOCK_N, element)
            x += _multiply(r_tail, tail_twice, WIDE)
            x_tail = _multiply(r_of_tail, y_twice, WIDE)
            x_tail += _multiply(r_of_tail_tail, tail_twice, WIDE)
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


@triton.jit
def _retreat(grad_y, dh, grad_c, grad_log_n, w, z, not_f, o, c, c_old):  # type: ignore[no-untyped-def]  # as above
    # The gradients of one step; all that is loaded is 0 where a segment has ended.
    total_y = grad_y + dh.to(tl.float32)
    total_c = grad_c + total_y * o
    d_i = total_c * w * (1.0 - w) * (z - c_old) + grad_log_n * w
    grad_log_n -= d_i
    d_f = grad_log_n * not_f
    d_z = total_c * w * (1.0 - z * z)
    d_o = total_y * c * o * (1.0 - o)
    grad_c = total_c * (1.0 - w)

    return d_i, d_f, d_z, d_o, grad_c, grad_log_n


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_sums(grad_bias, cols, D: tl.constexpr, sum_i, sum_f, sum_z, sum_o):  # type: ignore[no-untyped-def]  # as above
    tl.store(grad_bias + cols, tl.sum(sum_i, 1))
    tl.store(grad_bias + D + cols, tl.sum(sum_f, 1))
    tl.store(grad_bias + 2 * D + cols, tl.sum(sum_z, 1))
    tl.store(grad_bias + 3 * D + cols, tl.sum(sum_o, 1))


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def slstm_backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915  # a kernel is one function
    begins,
    weight,
    gates,
    cs,
    grad_outputs,
    grad_inputs,
    grad_bias,
    H,
    N,
    plane,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Run a head of some segments back through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    segments = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_segment = segments < N
    first = tl.load(begins + expert * N + segments, mask=is_segment, other=0)
    last = tl.load(begins + expert * N + segments + 1, mask=is_segment, other=0)
    lens = last - first
    first = first.to(tl.int64)

    stack = (expert * H + head).to(tl.int64)
    element: tl.constexpr = weight.dtype.element_ty
    # R: rows (half, input), columns outputs, of i and z, and of f and o
    bodies = tl.arange(0, P)
    ins = tl.arange(0, 2 * P)
    from_body = weight + stack * 4 * D * D
    from_body = from_body + (ins % P * (4 * D) + ins // P * 2 * D)[:, None]
    r_iz = tl.load(from_body + bodies[None, :])
    r_fo = tl.load(from_body + D + bodies[None, :])

    t = tl.max(lens) - 1
    valid = ((t >= 0) & (t < lens))[None, :]
    has_old = ((t > 0) & (t - 1 < lens))[None, :]
    place = (((first + t) * H + head) * D)[None, :]
    at = place + bodies[:, None]
    next_dh = tl.load(grad_outputs + at, mask=valid, other=0.0)
    # Of a tensor (C,H,4,D)
    at_gates = gates + 4 * place + bodies[:, None]
    next_w, next_not_f, next_z, next_o = _load_four(at_gates, D, valid)
    next_c = tl.load(cs + at, mask=valid, other=0.0)
    next_c_old = tl.load(cs + at - H * D, mask=has_old, other=0.0)
    zeros = tl.zeros((P, BLOCK_N), tl.float32)
    grad_c, grad_log_n, grad_y = zeros, zeros, zeros
    sum_i, sum_f, sum_z, sum_o = zeros, zeros, zeros, zeros
    if Q > 0:
        tails = P + tl.arange(0, Q)
        # The tail's outputs: (gate, output) in pairs (i, f), (z, o)
        pairs = tl.arange(0, 2 * Q)
        outs_pair = P + pairs // Q * D + pairs % Q
        r_tail = tl.load(from_body + outs_pair[None, :])
        from_tail = weight + stack * 4 * D * D
        from_tail = (
            from_tail + ((P + pairs % Q) * (4 * D) + pairs // Q * 2 * D)[:, None]
        )
        r_iz_of_tail = tl.load(from_tail + bodies[None, :])
        r_fo_of_tail = tl.load(from_tail + D + bodies[None, :])
        r_tail_of_tail = tl.load(from_tail + outs_pair[None, :])
        at = place + tails[:, None]
        next_dh_tail = tl.load(grad_outputs + at, mask=valid, other=0.0)
        next_w_tail, next_not_f_tail, next_z_tail, next_o_tail = _load_four(
            gates + 4 * place + tails[:, None], D, valid
        )
        next_c_tail = tl.load(cs + at, mask=valid, other=0.0)
        next_c_old_tail = tl.load(cs + at - H * D, mask=has_old, other=0.0)
        zeros = tl.zeros((Q, BLOCK_N), tl.float32)
        grad_c_tail, grad_log_n_tail, grad_y_tail = zeros, zeros, zeros
        sum_i_tail, sum_f_tail, sum_z_tail, sum_o_tail = zeros, zeros, zeros, zeros

    while t >= 0:
        valid = (t < lens)[None, :]
        is_next = ((t > 0) & (t - 1 < lens))[None, :]
        has_old = ((t > 1) & (t - 2 < lens))[None, :]
        place = (((first + t) * H + head) * D)[None, :]
        # Of the step to come, which arrives during this one
        place_next = (((first + t - 1) * H + head) * D)[None, :]
        at_next = place_next + bodies[:, None]
        w, not_f, z, o = next_w, next_not_f, next_z, next_o
        dh, c, c_old = next_dh, next_c, next_c_old
        next_dh = tl.load(grad_outputs + at_next, mask=is_next, other=0.0)
        next_w, next_not_f, next_z, next_o = _load_four(
            gates + 4 * place_next + bodies[:, None], D, is_next
        )
        next_c = c_old
        next_c_old = tl.load(cs + at_next - H * D, mask=has_old, other=0.0)

        d_i, d_f, d_z, d_o, grad_c, grad_log_n = _retreat(
            grad_y, dh, grad_c, grad_log_n, w, z, not_f, o, c, c_old
        )
        sum_i += d_i
        sum_f += d_f
        sum_z += d_z
        sum_o += d_o
        iz = _columns(d_i, d_z, P, BLOCK_N, element)
        fo = _columns(d_f, d_o, P, BLOCK_N, element)
        dy = _multiply(r_iz, iz, WIDE) + _multiply(r_fo, fo, WIDE)
        # Of a tensor (2,C,H,2,D)
        into = grad_inputs + 2 * place + bodies[:, None]
        tl.store(into, d_i.to(element), mask=valid)
        tl.store(into + D, d_f.to(element), mask=valid)
        tl.store(into + plane, d_z.to(element), mask=valid)
        tl.store(into + plane + D, d_o.to(element), mask=valid)

        if Q > 0:
            at_tail = place_next + tails[:, None]
            w_tail, not_f_tail = next_w_tail, next_not_f_tail
            z_tail, o_tail = next_z_tail, next_o_tail
            dh_tail, c_tail, c_old_tail = next_dh_tail, next_c_tail, next_c_old_tail
            next_dh_tail = tl.load(grad_outputs + at_tail, mask=is_next, other=0.0)
            next_w_tail, next_not_f_tail, next_z_tail, next_o_tail = _load_four(
                gates + 4 * place_next + tails[:, None], D, is_next
            )
            next_c_tail = c_old_tail
            next_c_old_tail = tl.load(cs + at_tail - H * D, mask=has_old, other=0.0)
            d_i_tail, d_f_tail, d_z_tail, d_o_tail, grad_c_tail, grad_log_n_tail = (
                _retreat(
                    grad_y_tail,
                    dh_tail,
                    grad_c_tail,
                    grad_log_n_tail,
                    w_tail,
                    z_tail,
                    not_f_tail,
                    o_tail,
                    c_tail,
                    c_old_tail,
                )
            )
            sum_i_tail += d_i_tail
            sum_f_tail += d_f_tail
            sum_z_tail += d_z_tail
            sum_o_tail += d_o_tail
            # Of both pairs of gates, (Q,16) -> ((gate, output),16)
            both = tl.join(
                _columns(d_i_tail, d_z_tail, Q, BLOCK_N, tl.float32),
                _columns(d_f_tail, d_o_tail, Q, BLOCK_N, tl.float32),
            )
            both = tl.reshape(tl.permute(both, (2, 0, 1)), (2 * Q, 16))
            both = both.to(element)
            dy += _multiply(r_tail, both, WIDE)
            dy_tail = _multiply(r_iz_of_tail, iz, WIDE)
            dy_tail += _multiply(r_fo_of_tail, fo, WIDE)
            dy_tail += _multiply(r_tail_of_tail, both, WIDE)
            grad_y_tail = _own_half(dy_tail, Q, BLOCK_N)
            into_tail = grad_inputs + 2 * place + tails[:, None]
            tl.store(into_tail, d_i_tail.to(element), mask=valid)
            tl.store(into_tail + D, d_f_tail.to(element), mask=valid)
            tl.store(into_tail + plane, d_z_tail.to(element), mask=valid)
            tl.store(into_tail + plane + D, d_o_tail.to(element), mask=valid)

        grad_y = _own_half(dy, P, BLOCK_N)
        t -= 1

    # In a tensor of shape (E,H,blocks,4,D)
    grad_bias += (stack * tl.num_programs(0) + tl.program_id(0)) * 4 * D
    _store_sums(grad_bias, bodies, D, sum_i, sum_f, sum_z, sum_o)
    if Q > 0:
        _store_sums(grad_bias, tails, D, sum_i_tail, sum_f_tail, sum_z_tail, sum_o_tail)
