"""The backward kernel of the sLSTM on ragged rows; see :mod:`.slstm_rows_tiles`."""

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
    load_four_here,
    load_here,
    store_here,
)
from moxe_plugin.nn.triton.tile_products import multiply


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _load_step(  # type: ignore[no-untyped-def]  # as above
    at,
    stride,
    grad_outputs,
    gates,
    cs,
    first_c,
    last_y,
    t,
    lens,
    HAS_MEMORY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    valid = ((t >= 0) & (t < lens))[None, :]
    dh = load_here(grad_outputs + at, valid, INTERPRETED)
    # Of a tensor (C,H,D,4)
    w, not_f, z, o = load_four_here(gates + 4 * at, valid, INTERPRETED)
    if HAS_MEMORY:
        dh += tl.where((t + 1 == lens)[None, :], last_y, 0.0)
        c_old = load_here(
            tl.where(t > 0, cs + at - stride, first_c), valid, INTERPRETED
        )
    else:
        c_old = load_here(cs + at - stride, valid & (t > 0), INTERPRETED)
    return dh, w, not_f, z, o, c_old


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_step(  # type: ignore[no-untyped-def]  # as above
    into, plane, D: tl.constexpr, d_i, d_f, d_z, d_o, valid, INTERPRETED: tl.constexpr
):
    # Into a tensor (2,C,H,2,D)
    store_here(into, d_i, valid, INTERPRETED)
    store_here(into + D, d_f, valid, INTERPRETED)
    store_here(into + plane, d_z, valid, INTERPRETED)
    store_here(into + plane + D, d_o, valid, INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _stack(  # type: ignore[no-untyped-def]  # as above
    d_i, d_f, d_z, d_o, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, element: tl.constexpr
):
    # Four of (SIZE,N) -> rows (pair, output), columns (segment, half)
    both = tl.join(
        columns(d_i, d_z, SIZE, BLOCK_N, tl.float32),
        columns(d_f, d_o, SIZE, BLOCK_N, tl.float32),
    )
    return tl.reshape(tl.permute(both, (2, 0, 1)), (2 * SIZE, 16)).to(element)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _own_half(x, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # ((half, SIZE),(N, half)) -> (SIZE,N), the sum of both halves' own
    x = first_copy(x, 2 * SIZE, BLOCK_N)
    x = tl.permute(tl.reshape(x, (2, SIZE, BLOCK_N, 2)), (1, 2, 3, 0))
    first, second = tl.split(x)
    own, _ = tl.split(first)
    _, other = tl.split(second)
    return own + other


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _own_half_of_tail(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # The same of rows (channel // 8, half, channel % 8)
    x = tl.reshape(x, (SIZE // 8, 2, 8, 8, 2))
    x = tl.reshape(tl.permute(x, (0, 2, 3, 1, 4)), (SIZE, 8, 2, 2))
    first, second = tl.split(x)
    own, _ = tl.split(first)
    _, other = tl.split(second)
    return own + other


@triton.jit
def _retreat(total_y, grad_c, grad_log_n, w, not_f, z, o, c_old):  # type: ignore[no-untyped-def]  # as above
    # The gradients of one step; all that is loaded is 0 where a segment has ended.
    c = c_old + w * (z - c_old)
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
    bounds,
    weight,
    gates,
    cs,
    first_c,
    grad_outputs,
    grad_last_c,
    grad_last_log_n,
    grad_last_y,
    grad_inputs,
    grad_bias,
    grad_first_c,
    grad_first_log_n,
    grad_first_y,
    H,
    N,
    plane,
    D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Run a head of some segments back through all steps."""
    head, expert = tl.program_id(1), tl.program_id(2)
    first, lens = find_segments(bounds, expert, N, STEP, BLOCK_N, BLOCK_N)

    stack = (expert * H + head).to(tl.int64)
    element: tl.constexpr = weight.dtype.element_ty
    # R: rows (half, input), columns (pair, output), of which half and pair are the gate
    bodies = tl.arange(0, P)
    rows = tl.arange(0, 2 * P)
    outs = rows // P * D + rows % P
    from_body = weight + stack * 4 * D * D
    from_body = from_body + (rows % P * (4 * D) + rows // P * 2 * D)[:, None]
    r = tl.load(from_body + outs[None, :])

    zeros = tl.zeros((P, BLOCK_N), tl.float32)
    d_i, d_f, d_z, d_o, total_y = zeros, zeros, zeros, zeros, zeros
    sum_i, sum_f, sum_z, sum_o = zeros, zeros, zeros, zeros
    at_state, is_state = find_states(expert, head, H, N, D, BLOCK_N, BLOCK_N)
    at_state += bodies[:, None]
    grad_c, grad_log_n, last_y = load_states(
        *(grad_last_c, grad_last_log_n, grad_last_y, at_state, is_state),
        *(P, BLOCK_N, 0.0, HAS_MEMORY, INTERPRETED),
    )
    if Q > 0:
        tails = P + tl.arange(0, Q)
        rows_tail = tl.arange(0, 2 * Q)
        outs_tail = P + rows_tail // Q * D + rows_tail % Q
        r_tail = tl.load(from_body + outs_tail[None, :])
        # Rows (input // 8, half, input % 8): where the tensor cores leave the sums,
        # both halves are with one thread then.
        ins = P + rows_tail // 16 * 8 + rows_tail % 8
        from_tail = weight + stack * 4 * D * D
        from_tail = from_tail + (ins * (4 * D) + rows_tail // 8 % 2 * 2 * D)[:, None]
        r_of_tail = tl.load(from_tail + outs[None, :])
        r_tail_of_tail = tl.load(from_tail + outs_tail[None, :])
        first_tail, lens_tail = find_segments(bounds, expert, N, STEP, BLOCK_N, 8)
        zeros = tl.zeros((Q, 8), tl.float32)
        d_i_tail, d_f_tail, d_z_tail, d_o_tail = zeros, zeros, zeros, zeros
        sum_i_tail, sum_f_tail, sum_z_tail, sum_o_tail = zeros, zeros, zeros, zeros
        total_y_tail = zeros
        at_state_tail, has_state_tail = find_states(expert, head, H, N, D, BLOCK_N, 8)
        at_state_tail += tails[:, None]
        grad_c_tail, grad_log_n_tail, last_y_tail = load_states(
            *(grad_last_c, grad_last_log_n, grad_last_y),
            *(at_state_tail, has_state_tail, Q, 8, 0.0, HAS_MEMORY, INTERPRETED),
        )

    # Lines of 32 elements: of a step's gates, and of c and outputs
    lines = tl.arange(0, 4 * LINES) * 32
    is_line = (lines < 4 * D)[:, None]
    few_lines = tl.arange(0, LINES) * 32
    is_few = (few_lines < D)[:, None]

    # Products wait for no memory: what a step has computed is stored during the next
    # one, between its first product and the others.
    t = tl.max(lens) - 1
    while t >= -1:
        was_valid = (t + 1 < lens)[None, :]
        place = (((first + t) * H + head) * D)[None, :]
        at = place + bodies[:, None]
        # Of the step after this one
        grads = _stack(d_i, d_f, d_z, d_o, P, BLOCK_N, element)
        if Q > 0:
            was_valid_tail = (t + 1 < lens_tail)[None, :]
            place_tail = (((first_tail + t) * H + head) * D)[None, :]
            at_tail = place_tail + tails[:, None]
            grads_tail = _stack(d_i_tail, d_f_tail, d_z_tail, d_o_tail, Q, 8, element)
            # Not one sum of both products: Triton would chain them, and chained they
            # have another layout.
            grad_y_tail = multiply(r_of_tail, grads, INTERPRETED)
            more_y_tail = multiply(r_tail_of_tail, grads_tail, INTERPRETED)
            _store_step(
                *(grad_inputs + 2 * H * D + place_tail + at_tail, plane, D),
                *(d_i_tail, d_f_tail, d_z_tail, d_o_tail, was_valid_tail, INTERPRETED),
            )
            dh_tail, w_tail, not_f_tail, z_tail, o_tail, c_old_tail = _load_step(
                *(at_tail, H * D, grad_outputs, gates, cs, first_c + at_state_tail),
                *(last_y_tail, t, lens_tail, HAS_MEMORY, INTERPRETED),
            )
        _store_step(
            *(grad_inputs + 2 * H * D + place + at, plane, D, d_i, d_f, d_z, d_o),
            *(was_valid, INTERPRETED),
        )
        dh, w, not_f, z, o, c_old = _load_step(
            *(at, H * D, grad_outputs, gates, cs, first_c + at_state),
            *(last_y, t, lens, HAS_MEMORY, INTERPRETED),
        )
        place_ahead = place - AHEAD * H * D
        is_ahead = ((t >= AHEAD) & (t - AHEAD < lens))[None, :]
        fetch_ahead(
            gates + 4 * place_ahead + lines[:, None], is_line & is_ahead, INTERPRETED
        )
        fetch_ahead(
            cs + place_ahead - H * D + few_lines[:, None],
            is_few & is_ahead & (t > AHEAD),
            INTERPRETED,
        )
        fetch_ahead(
            grad_outputs + place_ahead + few_lines[:, None],
            is_few & is_ahead,
            INTERPRETED,
        )

        grad_y = multiply(r, grads, INTERPRETED)
        if Q > 0:
            grad_y = multiply(r_tail, grads_tail, INTERPRETED, total=grad_y)

            grad_y_tail = _own_half_of_tail(grad_y_tail, Q)
            grad_y_tail += _own_half_of_tail(more_y_tail, Q)
            total_y_tail = grad_y_tail + dh_tail
            d_i_tail, d_f_tail, d_z_tail, d_o_tail, grad_c_tail, grad_log_n_tail = (
                _retreat(
                    *(total_y_tail, grad_c_tail, grad_log_n_tail),
                    *(w_tail, not_f_tail, z_tail, o_tail, c_old_tail),
                )
            )
            sum_i_tail += d_i_tail
            sum_f_tail += d_f_tail
            sum_z_tail += d_z_tail
            sum_o_tail += d_o_tail

        total_y = _own_half(grad_y, P, BLOCK_N) + dh
        d_i, d_f, d_z, d_o, grad_c, grad_log_n = _retreat(
            total_y, grad_c, grad_log_n, w, not_f, z, o, c_old
        )
        sum_i += d_i
        sum_f += d_f
        sum_z += d_z
        sum_o += d_o
        t -= 1

    store_states(
        *(grad_first_c, grad_first_log_n, grad_first_y, at_state),
        *(grad_c, grad_log_n, total_y, is_state, HAS_MEMORY, INTERPRETED),
    )
    if Q > 0:
        store_states(
            *(grad_first_c, grad_first_log_n, grad_first_y, at_state_tail),
            *(grad_c_tail, grad_log_n_tail, total_y_tail),
            *(has_state_tail, HAS_MEMORY, INTERPRETED),
        )

    # In a tensor of shape (E,H,blocks,4,D)
    grad_bias += (stack * tl.num_programs(0) + tl.program_id(0)) * 4 * D
    _store_sums(grad_bias, bodies, D, sum_i, sum_f, sum_z, sum_o)
    if Q > 0:
        # Of 4 segments all are there twice.
        is_once = (tl.arange(0, 8) < BLOCK_N)[None, :]
        _store_sums(
            *(grad_bias, tails, D),
            *(tl.where(is_once, sum_i_tail, 0.0), tl.where(is_once, sum_f_tail, 0.0)),
            *(tl.where(is_once, sum_z_tail, 0.0), tl.where(is_once, sum_o_tail, 0.0)),
        )
