"""The kernels of :mod:`moxe_plugin.nn.triton.slstm_scan`.

A program takes one head of one expert, and up to 16 rows of its batch, through all
steps; c and log(n) stay in registers. R does not fit on chip: at Table 1 size a head of
MoxE has D = 160, hence 160 * 640 * 4 bytes = 410 kB in float32, where a multiprocessor
of an H100 has 228 kB of shared memory; in 16 bits it does, and :mod:`.slstm_rows_tiles`
runs. So every step reads the tiles of R anew, from the L2 cache (of 40 MB and more, all
heads of a layer share it) or what L1 keeps of it.

The output y of a step, and backwards the gradients of its gates, are read by the next
product in other tiles than they are computed in; they go through global memory, with a
barrier among the threads of the program, which is the only one that touches them.

Why that is enough. Triton orders accesses to shared memory by itself, but not the store
of one thread and the load of another in global memory. ``tl.debug_barrier`` becomes
``bar.sync``, which all threads reach, as the loop's condition is one number for all of
them, and which makes what each wrote before it visible to all that is read after it. No
pass moves an access to memory across a barrier, which counts as reading and writing
everything: what the pipeline of the inner loop reads ahead starts after the barrier
before that loop, and has arrived when the loop ends. Loads are plain, or ``cp.async``
that starts after the barrier, never the non-coherent ``ld.global.nc`` (a test looks).
Memories that are loaded at first and stored at last lie in other threads then; between
is a barrier, or no step, and the stores write what is there already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.gate_functions import log_sigmoid, sigmoid
from moxe_plugin.nn.triton.launching import Launcher


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: D103, PLR0915  # see scan_forward
    lens,
    gates_if,
    gates_zo,
    bias,
    weight,
    outputs,
    activations,
    cs,
    c_memory,
    log_n_memory,
    y_memory,
    H,
    N,
    S,
    D: tl.constexpr,
    SAVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, expert = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < D
    stack = (expert * H + head).to(tl.int64)
    row_lens = tl.load(lens + expert * N + rows, mask=rows < N, other=0)

    # The first element of each row: of (E,N,H,D), of a position in (E,H,N,S)
    state_begin = (((expert * N + rows).to(tl.int64) * H + head) * D)[:, None]
    row_begin = (stack * N + rows) * S
    output_begin = (expert * N + rows).to(tl.int64) * S

    in_state = (rows < N)[:, None] & is_col[None, :]
    c = tl.load(c_memory + state_begin + cols, mask=in_state, other=0.0)
    log_n = tl.load(log_n_memory + state_begin + cols, mask=in_state, other=0.0)

    biases = bias + stack * 4 * D + cols
    bias_i = tl.load(biases, mask=is_col, other=0.0).to(tl.float32)[None, :]
    bias_f = tl.load(biases + D, mask=is_col, other=0.0).to(tl.float32)[None, :]
    bias_z = tl.load(biases + 2 * D, mask=is_col, other=0.0).to(tl.float32)[None, :]
    bias_o = tl.load(biases + 3 * D, mask=is_col, other=0.0).to(tl.float32)[None, :]

    # The interpreter takes no tensor as the end of a range.
    num_steps = tl.max(row_lens)
    t = 0
    while t < num_steps:
        valid = (t < row_lens)[:, None] & is_col[None, :]
        position = (row_begin + t)[:, None]

        at = position * 2 * D + cols
        i = bias_i + tl.load(gates_if + at, mask=valid, other=0.0).to(tl.float32)
        f = bias_f + tl.load(gates_if + at + D, mask=valid, other=0.0).to(tl.float32)
        z = bias_z + tl.load(gates_zo + at, mask=valid, other=0.0).to(tl.float32)
        o = bias_o + tl.load(gates_zo + at + D, mask=valid, other=0.0).to(tl.float32)

        for k in range(0, D, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            is_k = ks < D
            y = tl.load(
                y_memory + state_begin + ks,
                mask=(t < row_lens)[:, None] & is_k[None, :],
                other=0.0,
            ).to(weight.dtype.element_ty)
            tile = weight + (stack * D + ks)[:, None] * 4 * D + cols
            in_tile = is_k[:, None] & is_col[None, :]
            r = tl.load(tile, mask=in_tile, other=0.0)
            i = tl.dot(y, r, i, input_precision=PRECISION)
            r = tl.load(tile + D, mask=in_tile, other=0.0)
            f = tl.dot(y, r, f, input_precision=PRECISION)
            r = tl.load(tile + 2 * D, mask=in_tile, other=0.0)
            z = tl.dot(y, r, z, input_precision=PRECISION)
            r = tl.load(tile + 3 * D, mask=in_tile, other=0.0)
            o = tl.dot(y, r, o, input_precision=PRECISION)

        log_kept = log_sigmoid(f) + log_n
        w = sigmoid(i - log_kept)
        z = 2.0 * sigmoid(2.0 * z) - 1.0
        o = sigmoid(o)
        higher = tl.maximum(log_kept, i)
        log_sum = higher + tl.log(1.0 + tl.exp(-tl.abs(log_kept - i)))
        c = tl.where(valid, c + w * (z - c), c)
        log_n = tl.where(valid, log_sum, log_n)
        y_new = o * c

        # All threads have read the old y: no store overtakes a load.
        tl.debug_barrier()
        tl.store(y_memory + state_begin + cols, y_new, mask=valid)
        at = ((output_begin + t)[:, None] * H + head) * D + cols
        tl.store(outputs + at, y_new, mask=valid)
        if SAVES:
            tl.store(cs + position * D + cols, c, mask=valid)
            at = position * 4 * D + cols
            tl.store(activations + at, w, mask=valid)
            tl.store(activations + at + D, sigmoid(-f), mask=valid)
            tl.store(activations + at + 2 * D, z, mask=valid)
            tl.store(activations + at + 3 * D, o, mask=valid)
        # All have written the new y: no load of the next step overtakes a store.
        tl.debug_barrier()
        t += 1

    tl.store(c_memory + state_begin + cols, c, mask=in_state)
    tl.store(log_n_memory + state_begin + cols, log_n, mask=in_state)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def backward_kernel(  # type: ignore[no-untyped-def]  # noqa: D103, PLR0915  # see scan_backward
    lens,
    transposed,
    first_c,
    outputs,
    activations,
    cs,
    grad_outputs,
    grad_if,
    grad_zo,
    grad_c_memory,
    grad_log_n_memory,
    grad_y_memory,
    H,
    N,
    S,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, expert = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < D
    stack = (expert * H + head).to(tl.int64)
    row_lens = tl.load(lens + expert * N + rows, mask=rows < N, other=0)

    state_begin = (((expert * N + rows).to(tl.int64) * H + head) * D)[:, None]
    row_begin = (stack * N + rows) * S
    output_begin = (expert * N + rows).to(tl.int64) * S

    in_state = (rows < N)[:, None] & is_col[None, :]
    grad_c = tl.load(grad_c_memory + state_begin + cols, mask=in_state, other=0.0)
    grad_log_n = tl.load(
        grad_log_n_memory + state_begin + cols, mask=in_state, other=0.0
    )
    grad_y = tl.load(grad_y_memory + state_begin + cols, mask=in_state, other=0.0)
    c_begin = tl.load(first_c + state_begin + cols, mask=in_state, other=0.0)

    t = tl.max(row_lens) - 1
    while t >= 0:
        valid = (t < row_lens)[:, None] & is_col[None, :]
        position = (row_begin + t)[:, None]

        at = position * 4 * D + cols
        w = tl.load(activations + at, mask=valid, other=0.0)
        not_f = tl.load(activations + at + D, mask=valid, other=0.0)
        z = tl.load(activations + at + 2 * D, mask=valid, other=0.0)
        o = tl.load(activations + at + 3 * D, mask=valid, other=0.0)
        c_old = tl.load(cs + (position - 1) * D + cols, mask=valid & (t > 0), other=0.0)
        c_old = tl.where(t > 0, c_old, c_begin)

        at = ((output_begin + t)[:, None] * H + head) * D + cols
        y = tl.load(outputs + at, mask=valid, other=0.0)
        # All that is loaded is 0 where a row has ended, and so is each product.
        total_y = grad_y + tl.load(grad_outputs + at, mask=valid, other=0.0)
        total_c = grad_c + total_y * o
        d_i = total_c * w * (1.0 - w) * (z - c_old) + grad_log_n * w
        grad_log_n -= d_i
        d_f = grad_log_n * not_f
        d_z = total_c * w * (1.0 - z * z)
        d_o = total_y * y * (1.0 - o)
        grad_c = total_c * (1.0 - w)

        at = position * 2 * D + cols
        tl.store(grad_if + at, d_i, mask=valid)
        tl.store(grad_if + at + D, d_f, mask=valid)
        tl.store(grad_zo + at, d_z, mask=valid)
        tl.store(grad_zo + at + D, d_o, mask=valid)
        # All threads have written what all will read. One barrier is enough: a thread
        # that is a step ahead writes at its own position, which no other reads now.
        tl.debug_barrier()

        product = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            is_k = ks < D
            in_gate = (t < row_lens)[:, None] & is_k[None, :]
            at_k = position * 2 * D + ks
            tile = transposed + (stack * 4 * D + ks)[:, None] * D + cols
            in_tile = is_k[:, None] & is_col[None, :]
            element = transposed.dtype.element_ty

            g = tl.load(grad_if + at_k, mask=in_gate, other=0.0).to(element)
            r = tl.load(tile, mask=in_tile, other=0.0)
            product = tl.dot(g, r, product, input_precision=PRECISION)
            g = tl.load(grad_if + at_k + D, mask=in_gate, other=0.0).to(element)
            r = tl.load(tile + D * D, mask=in_tile, other=0.0)
            product = tl.dot(g, r, product, input_precision=PRECISION)
            g = tl.load(grad_zo + at_k, mask=in_gate, other=0.0).to(element)
            r = tl.load(tile + 2 * D * D, mask=in_tile, other=0.0)
            product = tl.dot(g, r, product, input_precision=PRECISION)
            g = tl.load(grad_zo + at_k + D, mask=in_gate, other=0.0).to(element)
            r = tl.load(tile + 3 * D * D, mask=in_tile, other=0.0)
            product = tl.dot(g, r, product, input_precision=PRECISION)

        grad_y = tl.where(valid, product, grad_y)
        t -= 1

    tl.store(grad_c_memory + state_begin + cols, grad_c, mask=in_state)
    tl.store(grad_log_n_memory + state_begin + cols, grad_log_n, mask=in_state)
    tl.store(grad_y_memory + state_begin + cols, grad_y, mask=in_state)
