"""The backward kernel of the sLSTM on ragged rows; see :mod:`.slstm_rows_tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.slstm_rows_tiles import columns, first_copy
from moxe_plugin.nn.triton.tile_products import multiply


@triton.jit
def _load_four(base, step, valid):  # type: ignore[no-untyped-def]  # Triton's arguments have no type
    # Of few channels, each gate by itself goes to fewer threads than all at once.
    i = tl.load(base, mask=valid, other=0.0)
    f = tl.load(base + step, mask=valid, other=0.0)
    z = tl.load(base + 2 * step, mask=valid, other=0.0)
    o = tl.load(base + 3 * step, mask=valid, other=0.0)
    return i, f, z, o


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _own_half(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # ((half, SIZE),(N, half)) -> (SIZE,N), the sum of both halves' own
    x = first_copy(x, 2 * SIZE, BLOCK_N)
    x = tl.permute(tl.reshape(x, (2, SIZE, BLOCK_N, 2)), (1, 2, 3, 0))
    first, second = tl.split(x)
    own, _ = tl.split(first)
    _, other = tl.split(second)
    return own + other


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
    INTERPRETED: tl.constexpr,
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
        iz = columns(d_i, d_z, P, BLOCK_N, element)
        fo = columns(d_f, d_o, P, BLOCK_N, element)
        dy = multiply(r_iz, iz, INTERPRETED) + multiply(r_fo, fo, INTERPRETED)
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
                columns(d_i_tail, d_z_tail, Q, BLOCK_N, tl.float32),
                columns(d_f_tail, d_o_tail, Q, BLOCK_N, tl.float32),
            )
            both = tl.reshape(tl.permute(both, (2, 0, 1)), (2 * Q, 16))
            both = both.to(element)
            dy += multiply(r_tail, both, INTERPRETED)
            dy_tail = multiply(r_iz_of_tail, iz, INTERPRETED)
            dy_tail += multiply(r_fo_of_tail, fo, INTERPRETED)
            dy_tail += multiply(r_tail_of_tail, both, INTERPRETED)
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
