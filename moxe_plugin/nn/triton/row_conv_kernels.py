"""The kernels of the causal convolution on rows, with K = 4 taps.

A program walks down some rows of some columns, four at a time. What earlier rows give
to later ones, or in the backward pass get from them, it keeps in registers: the last
K-1 inputs, and the gradients of the last K-1 inputs, which are not complete yet. For
these it runs up to K-1 rows into what is another program's. Where the expert changes it
begins again.

Imports triton, so it is imported by who runs it only.
"""

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _place(width, COLS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Of the same rows, columns after columns
    num_tiles = tl.cdiv(width, COLS)
    program = tl.program_id(0)

    return program // num_tiles, program % num_tiles * COLS + tl.arange(0, COLS)


@triton.jit
def _load(tensor, row, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    at = tensor + row.to(tl.int64) * stride + col
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(out, row, stride, col, mask, x):  # type: ignore[no-untyped-def]  # as above
    at = out + row.to(tl.int64) * stride + col
    tl.store(at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _load_taps(weight, bias, expert, width, col, mask):  # type: ignore[no-untyped-def]  # as above
    row = expert * 4
    w0 = _load(weight, row, width, col, mask)
    w1 = _load(weight, row + 1, width, col, mask)
    w2 = _load(weight, row + 2, width, col, mask)
    w3 = _load(weight, row + 3, width, col, mask)

    return w0, w1, w2, w3, _load(bias, expert, width, col, mask)


@triton.jit
def _load_window(flat, step_of_row, row, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    # Where the step is k, there are k rows of the segment before.
    step = tl.load(step_of_row + row)
    x0 = _load(flat, row - 3, stride, col, mask & (step >= 3))
    x1 = _load(flat, row - 2, stride, col, mask & (step >= 2))
    x2 = _load(flat, row - 1, stride, col, mask & (step >= 1))

    return x0, x1, x2


@triton.jit
def _load_four(tensor, row, begin, end, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    r0, r1, r2, r3 = row, row + 1, row + 2, row + 3
    x0 = _load(tensor, r0, stride, col, mask & (r0 >= begin) & (r0 < end))
    x1 = _load(tensor, r1, stride, col, mask & (r1 >= begin) & (r1 < end))
    x2 = _load(tensor, r2, stride, col, mask & (r2 >= begin) & (r2 < end))
    x3 = _load(tensor, r3, stride, col, mask & (r3 >= begin) & (r3 < end))

    return x0, x1, x2, x3


@triton.jit
def _load_steps(step_of_row, row, limit):  # type: ignore[no-untyped-def]  # as above
    s0 = tl.load(step_of_row + row, mask=row < limit, other=0)
    s1 = tl.load(step_of_row + row + 1, mask=row + 1 < limit, other=0)
    s2 = tl.load(step_of_row + row + 2, mask=row + 2 < limit, other=0)
    s3 = tl.load(step_of_row + row + 3, mask=row + 3 < limit, other=0)

    return s0, s1, s2, s3


@triton.jit
def _convolve(window, x, step, taps):  # type: ignore[no-untyped-def]  # as above
    """Return the sum, and the window, in which nothing is before a segment."""
    is_first = step == 0
    x0 = tl.where(is_first, 0.0, window[0])
    x1 = tl.where(is_first, 0.0, window[1])
    x2 = tl.where(is_first, 0.0, window[2])
    y = taps[4] + taps[0] * x0 + taps[1] * x1 + taps[2] * x2 + taps[3] * x

    return y, (x0, x1, x2)


@triton.jit
def _forward(out, row, end, width, col, mask, window, x, step, taps):  # type: ignore[no-untyped-def]  # as above
    """Store the output of a row, and return the window of the next."""
    y, window = _convolve(window, x, step, taps)
    _store(out, row, width, col, mask & (row < end), y * tl.sigmoid(y))

    return window[1], window[2], x


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def conv_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    flat,
    weight,
    bias,
    out,
    begins,
    segment_of_row,
    step_of_row,
    num_rows,
    num_seqs,
    width,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Convolve and apply SiLU."""
    block, col = _place(width, COLS)
    is_col = col < width
    row = block * ROWS
    last = tl.minimum(row + ROWS, num_rows)
    expert = tl.load(segment_of_row + row) // num_seqs

    while row < last:
        end = tl.minimum(last, tl.load(begins + (expert + 1) * num_seqs))
        taps = _load_taps(weight, bias, expert, width, col, is_col)
        window = _load_window(flat, step_of_row, row, stride, col, is_col)

        while row < end:
            x = _load_four(flat, row, row, end, stride, col, is_col)
            step = _load_steps(step_of_row, row, end)

            for i in tl.static_range(4):
                window = _forward(
                    *(out, row + i, end, width, col, is_col),
                    *(window, x[i], step[i], taps),
                )
            row += 4

        row = end
        expert += 1


@triton.jit
def _backward(window, pending, sums, x, grad, step, is_own, taps):  # type: ignore[no-untyped-def]  # as above
    """Return what three inputs are followed by a row, and the complete gradient."""
    y, window = _convolve(window, x, step, taps)
    sigmoid = tl.sigmoid(y)
    dy = grad * sigmoid * (1 + y * (1 - sigmoid))

    # What a row gives to itself and to those before, as far as its segment reaches
    done = pending[0] + tl.where(step >= 3, taps[0] * dy, 0.0)
    d1 = pending[1] + tl.where(step >= 2, taps[1] * dy, 0.0)
    d2 = pending[2] + tl.where(step >= 1, taps[2] * dy, 0.0)

    own = tl.where(is_own, dy, 0.0)
    g0 = sums[0] + window[0] * own
    g1 = sums[1] + window[1] * own
    g2 = sums[2] + window[2] * own
    g3 = sums[3] + x * own

    return (
        (window[1], window[2], x),
        (d1, d2, taps[3] * dy),
        (g0, g1, g2, g3, sums[4] + own),
        done,
    )


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def conv_backward_kernel(  # type: ignore[no-untyped-def]  # as above
    grad,
    flat,
    weight,
    bias,
    added,
    out,
    partials,
    begins,
    segment_of_row,
    step_of_row,
    num_rows,
    num_seqs,
    width,
    grad_stride,
    stride,
    added_stride,
    out_stride,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Compute the gradient of the inputs, and sums of those of taps and bias."""
    block, col = _place(width, COLS)
    is_col = col < width
    first = block * ROWS
    last = tl.minimum(first + ROWS, num_rows)
    expert = tl.load(segment_of_row + first) // num_seqs

    while first < last:
        end = tl.minimum(last, tl.load(begins + (expert + 1) * num_seqs))
        # Beyond are no rows that hand something back to the last of these.
        limit = tl.minimum(end + 3, num_rows)
        taps = _load_taps(weight, bias, expert, width, col, is_col)
        window = _load_window(flat, step_of_row, first, stride, col, is_col)

        zero = tl.zeros((COLS,), tl.float32)
        pending, sums = (zero, zero, zero), (zero, zero, zero, zero, zero)

        row = first
        while row < end + 3:
            x = _load_four(flat, row, row, limit, stride, col, is_col)
            upstream = _load_four(*(grad, row, row, limit, grad_stride, col, is_col))
            step = _load_steps(step_of_row, row, limit)
            if ADDS:
                other = _load_four(
                    *(added, row - 3, first, end, added_stride, col, is_col)
                )

            for i in tl.static_range(4):
                window, pending, sums, done = _backward(
                    *(window, pending, sums),
                    *(x[i], upstream[i], step[i], row + i < end, taps),
                )
                if ADDS:
                    done += other[i]
                is_done = (row + i - 3 >= first) & (row + i - 3 < end)
                _store(out, row + i - 3, out_stride, col, is_col & is_done, done)
            row += 4

        # In the middle of a block, an expert without a row has a slot, but no sums.
        if end > first:
            for i in tl.static_range(5):
                slot = (block + expert) * 5 + i
                _store(partials, slot, width, col, is_col, sums[i])

        first = end
        expert += 1
