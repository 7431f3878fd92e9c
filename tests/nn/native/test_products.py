"""Tests of `moxe_plugin.nn.native.products`, against products in float64."""

from __future__ import annotations

import os
import signal
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from typing import Final

import pytest
import torch
from torch import Tensor, inf, nan
from torch.testing import assert_close

from moxe_plugin.nn.native import products
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.products import (
    NUM_NUMBERS,
    Product,
    Rounding,
    Triangle,
    find_halves,
    find_suffix,
    multiply_all,
    multiply_described,
    rounding_now,
)
from moxe_plugin.nn.native.row_products import (
    ColumnProduct,
    RowProduct,
    multiply_columns,
    multiply_rows,
)

# Around the vectors, tiles, panels and blocks of the C++ code.
SIZES: Final = (0, 1, 13, 14, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 513)

# Beyond what is summed at a time: results of some tiles, and of small ones.
LARGE: Final = ((61, 70, 2500), (40, 64, 2500))

# More rows than one thread packs.
MANY: Final = ((4500, 40, 17),)

GUARD: Final = 77.0


def find_obstacle() -> str | None:
    """Return why these products cannot run here."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"torch uses {capability}, and they need AVX512"

    return why_not_loaded("products")


needs_avx512 = pytest.mark.skipif(
    find_obstacle() is not None, reason=f"no products in C++ here: {find_obstacle()}"
)


def make_columns(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


def make_slice(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 5)[..., 2:-1, 4:-1]


def make_strided(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], 2 * shape[-2], 3 * shape[-1])[..., ::2, ::3]


def make_equal_rows(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], 1, shape[-1]).expand(shape)


def make_equal_columns(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 1).expand(shape)


def make_equal_matrices(*shape: int) -> Tensor:
    return torch.randn(shape[-2:]).expand(shape)


LAYOUTS: Final[dict[str, Callable[..., Tensor]]] = {
    "rows": torch.randn,
    "columns": make_columns,
    "slice": make_slice,
    "strided": make_strided,
    "equal_rows": make_equal_rows,
    "equal_columns": make_equal_columns,
    "equal_matrices": make_equal_matrices,
}


def check_product(
    lhs: Tensor, rhs: Tensor, actual: Tensor, old: Tensor | None = None
) -> None:
    """Check a product, or what it was added to, in the bound of any order of sums."""
    left, right = lhs.double(), rhs.double()
    expected, size = left @ right, left.abs() @ right.abs()
    if old is not None:
        expected, size = expected + old, size + old.abs()

    # Half a unit in the last place for each multiply-add; the factor is for squares.
    bound = 1.001 * (lhs.size(-1) + 1) * 2.0**-24 * size

    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


def multiply(lhs: Tensor, rhs: Tensor) -> Tensor:
    out = torch.full((*lhs.shape[:-1], rhs.size(-1)), nan)
    multiply_all([Product(lhs, rhs, out)])

    return out


def list_sizes(num_steps: int) -> list[tuple[int, int, int]]:
    """Return m, n and k; with as many steps as sizes, every m meets every n."""
    num = len(SIZES)

    return [
        (SIZES[i], SIZES[(i + step) % num], SIZES[(i + 3 * step + 1) % num])
        for i in range(num)
        for step in range(num_steps)
    ]


@needs_avx512
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("right", ["rows", "columns"])
@pytest.mark.parametrize("left", ["rows", "columns"])
def test_products_of_all_sizes_in_one_call(left: str, right: str, adds: bool) -> None:
    wanted = [
        Product(LAYOUTS[left](m, k), LAYOUTS[right](k, n), torch.randn(m, n))
        for m, n, k in [*list_sizes(len(SIZES)), *LARGE, *MANY]
    ]
    old = [out.clone() for *_, out in wanted]

    multiply_all(wanted, adds=adds)

    for (lhs, rhs, out), before in zip(wanted, old, strict=True):
        check_product(lhs, rhs, out, before if adds else None)


@needs_avx512
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_factors_have_any_layout(left: str, right: str) -> None:
    wanted = [
        Product(
            LAYOUTS[left](*batch, m, k),
            LAYOUTS[right](*batch, k, n),
            torch.full((*batch, m, n), nan),
        )
        for batch in ([], [3])
        for m, n, k in list_sizes(1)
    ]

    multiply_all(wanted)

    for lhs, rhs, out in wanted:
        check_product(lhs, rhs, out)


@needs_avx512
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("begin", [0, 1], ids=["aligned", "not_aligned"])
def test_writing_past_the_caches_changes_no_number(begin: int, adds: bool) -> None:
    # Results that are complete at once or after several parts, and tiles that are not.
    for m, n, k in [(29, 96, 40), (29, 80, 512), (3, 64, 7), (30, 64, 1100)]:
        lhs, rhs = torch.randn(m, k), torch.randn(k, n)
        matrices = torch.full((2, m, n + 32), GUARD)
        plain, streamed = (x[:, begin : begin + n] for x in matrices)

        multiply_all([Product(lhs, rhs, plain)], adds=adds)
        multiply_all([Product(lhs, rhs, streamed)], adds=adds, streams=True)

        assert torch.equal(plain, streamed)
        plain.fill_(GUARD)
        streamed.fill_(GUARD)
        assert (matrices == GUARD).all()


@needs_avx512
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
def test_nothing_beside_the_result_is_touched(adds: bool) -> None:
    for m, n, k in list_sizes(3):
        matrices = torch.full((2, m + 3, n + 21), GUARD)
        out = matrices[:, 1 : m + 1, 4 : n + 4]
        lhs, rhs = torch.randn(2, m, k), torch.randn(2, k, n)

        multiply_all([Product(lhs, rhs, out)], adds=adds)

        check_product(lhs, rhs, out, torch.full_like(out, GUARD) if adds else None)
        out.fill_(GUARD)
        assert (matrices == GUARD).all()


@needs_avx512
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("batch", [(), (2,), (0,)], ids=str)
def test_products_without_rows_or_columns_leave_others_alone(
    shape: tuple[int, int, int], batch: tuple[int, ...]
) -> None:
    m, n, k = shape
    lhs, rhs = torch.randn(3, 7), torch.randn(7, 4)
    out = torch.empty(3, 4)
    empty = torch.empty(*batch, m, n)

    multiply_all(
        [
            Product(torch.randn(*batch, m, k), torch.randn(*batch, k, n), empty),
            Product(lhs, rhs, out),
        ]
    )
    multiply_all([])

    check_product(lhs, rhs, out)


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("right", ["rows", "columns"])
@pytest.mark.parametrize("num_rows", [5, 60, 1000])
@pytest.mark.parametrize(("k", "n"), [(32, 32), (17, 64), (48, 33), (32, 256)])
def test_blocks_of_rows_are_multiplied_as_if_apart(
    k: int, n: int, num_rows: int, right: str, adds: bool
) -> None:
    num_blocks = 5
    # (N,B*k) -> (B,N,k), as channels of heads lie
    lhs = torch.randn(num_rows, num_blocks * k).view(num_rows, -1, k).transpose(0, 1)
    rhs = LAYOUTS[right](num_blocks, k, n)
    old = torch.randn(num_rows, num_blocks * n).view(num_rows, -1, n).transpose(0, 1)

    apart = old.contiguous()
    multiply_all([Product(*x) for x in zip(lhs, rhs, apart, strict=True)], adds=adds)
    check_product(lhs, rhs, apart, old if adds else None)

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        together = old.transpose(0, 1).clone().transpose(0, 1)
        multiply_all([Product(lhs, rhs, together)], adds=adds)

        assert torch.equal(together, apart)


@needs_avx512
@pytest.mark.parametrize(("adds", "value"), [(False, 0.0), (True, GUARD)])
def test_product_over_nothing_is_0(adds: bool, value: float) -> None:
    out = torch.full((2, 33, 40), GUARD)

    multiply_all(
        [Product(torch.empty(2, 33, 0), torch.empty(2, 0, 40), out)], adds=adds
    )

    assert (out == value).all()


@needs_avx512
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_stays_in_its_row_and_column(
    value: float, layout: str
) -> None:
    lhs, rhs = LAYOUTS[layout](30, 300), LAYOUTS[layout](300, 45)
    finite = multiply(lhs, rhs)

    lhs[7, 299], rhs[3, 44] = value, value
    rhs[299, 5] = 0.0
    actual = multiply(lhs, rhs)

    assert_close(actual, lhs @ rhs, equal_nan=True)
    # An infinity times 0.
    assert actual[7, 5].isnan()
    assert not actual[7].isfinite().any()
    assert not actual[:, 44].isfinite().any()

    keeps_row, keeps_column = torch.arange(30) != 7, torch.arange(45) != 44
    keeps_column[5] = False
    kept = keeps_row.unsqueeze(1) & keeps_column
    assert torch.equal(actual[kept], finite[kept])


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 16, 257, 1100])
def test_a_row_depends_on_nothing_but_itself(k: int, num_threads: int) -> None:
    lhs, rhs = torch.randn(500, k), torch.randn(k, 147)
    torch.set_num_threads(1)
    expected = multiply(lhs, rhs)

    torch.set_num_threads(num_threads)
    assert torch.equal(multiply(lhs, rhs), expected)

    for begin, end in [(0, 1), (499, 500), (3, 16), (10, 25), (37, 370)]:
        assert torch.equal(multiply(lhs[begin:end], rhs), expected[begin:end])

    # Neither columns beside it, nor how factors and results lie, matter.
    lhs_columns = lhs.mT.contiguous().mT
    for begin, end in [(0, 1), (5, 37), (9, 73), (20, 36), (140, 147)]:
        few_rows = multiply(lhs[10:60], rhs[:, begin:end])
        assert torch.equal(few_rows, expected[10:60, begin:end])
        columns = rhs[:, begin:end].mT.contiguous().mT
        assert torch.equal(multiply(lhs, columns), expected[:, begin:end])
        assert torch.equal(multiply(lhs_columns, columns), expected[:, begin:end])
        few_columns = multiply(lhs_columns, rhs[:, begin:end])
        assert torch.equal(few_columns, expected[:, begin:end])
    assert torch.equal(multiply(lhs_columns, rhs), expected)
    assert torch.equal(multiply(lhs[::3], rhs), expected[::3])


@needs_avx512
@pytest.mark.parametrize("k", [1, 30, 641, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_does_not_depend_on_how_its_left_factor_lies(
    dtype: torch.dtype, k: int
) -> None:
    lhs, rhs = torch.randn(71, k).to(dtype), torch.randn(k, 97).to(dtype)
    expected = multiply(lhs.mT.contiguous().mT, rhs)

    # Rows of the last share lines of a cache.
    for width in (k, k + 1, k + 2, 4096):
        rows = torch.full((71, width), nan, dtype=dtype)
        rows[:, width - k :] = lhs

        assert torch.equal(multiply(rows[:, width - k :], rhs), expected)


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_product_does_not_depend_on_others_of_the_call(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    factors = [
        (torch.randn(m, k), torch.randn(k, n))
        for m, n, k in [(1, 40, 300), (350, 70, 64), *list_sizes(2), (3, 33, 1500)]
    ]
    expected = [multiply(lhs, rhs) for lhs, rhs in factors]

    outs = [torch.full_like(x, nan) for x in expected]
    multiply_all([Product(*pair, out) for pair, out in zip(factors, outs, strict=True)])
    stack = torch.stack([factors[1][0]] * 3), torch.stack([factors[1][1]] * 3)

    assert all(map(torch.equal, outs, expected))
    for matrix in multiply(*stack):
        assert torch.equal(matrix, expected[1])


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
def test_threads_of_python_multiply_at_once() -> None:
    torch.set_num_threads(2)
    factors = [(torch.randn(90 + i, 200), torch.randn(200, 130)) for i in range(40)]
    expected = [multiply(lhs, rhs) for lhs, rhs in factors]

    with ThreadPoolExecutor(4) as executor:
        actual = list(executor.map(multiply, *zip(*factors, strict=True)))

    assert all(map(torch.equal, actual, expected))


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
def test_forked_process_multiplies_as_workers_of_data_loaders_do() -> None:
    lhs, rhs = torch.randn(300, 200), torch.randn(200, 130)
    torch.set_num_threads(2)
    expected = multiply(lhs, rhs)

    pid = os.fork()
    if pid == 0:
        # Not what pytest has it do, which waits for Python.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            # torch does so in every worker: OpenMP's threads are gone.
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(multiply(lhs, rhs), expected) else 1)
        finally:
            os._exit(2)

    assert os.waitpid(pid, 0)[1] == 0


@needs_avx512
@pytest.mark.parametrize(
    ("lhs", "rhs", "out"),
    [
        ((2, 3), (4, 5), (2, 5)),
        ((2, 3), (3, 5), (2, 6)),
        ((1, 2, 3), (4, 3, 5), (4, 2, 5)),
        ((4, 2, 3), (3, 5), (4, 2, 5)),
        ((2, 2, 2, 3), (2, 2, 3, 5), (2, 2, 2, 5)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> None:
    tensors = (torch.zeros(lhs), torch.zeros(rhs), torch.zeros(out))

    with pytest.raises(ValueError, match=r"`lhs`, `rhs` and `out` must be") as info:
        multiply_all([Product(*tensors)])

    assert f"{lhs}, {rhs} and {out}" in str(info.value)


@needs_avx512
@pytest.mark.parametrize(
    ("out", "found"),
    [
        (torch.zeros(2, 5, dtype=torch.float16), r"torch\.float16"),
        (torch.zeros(5, 2).mT, r"strides \(1, 2\)"),
    ],
    ids=["type", "strides"],
)
def test_results_that_cannot_be_written_are_refused(out: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=f"`out` must be float32 or .* is .*{found}"):
        multiply_all([Product(torch.zeros(2, 3), torch.zeros(3, 5), out)])


def test_lack_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_function(*_: str) -> Callable[..., int]:
        return lambda *_: 1

    monkeypatch.setattr(products, "find_function", find_function)

    with pytest.raises(MemoryError, match="factors of a product"):
        multiply(torch.zeros(2, 3), torch.zeros(3, 5))


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_autocast_rounds_factors_that_are_copied_and_nothing_else(
    left: str, right: str, adds: bool
) -> None:
    # More rows and columns than are read as they lie; the last is summed in pieces.
    sizes = [(65, 33, k) for k in (1, 2, 15, 16, 17, 31, 32, 33, 640)]
    for m, n, k in [*sizes, (70, 96, 31), (66, 65, 4200)]:
        lhs, rhs = LAYOUTS[left](m, k), LAYOUTS[right](k, n)
        old = torch.randn(m, n)
        out = old.clone() if adds else torch.full((m, n), nan)

        with torch.autocast("cpu", torch.bfloat16):
            multiply_all([Product(lhs, rhs, out)], adds=adds)

        # The bound of sums in float32 holds for the rounded factors.
        check_product(lhs.bfloat16(), rhs.bfloat16(), out, old if adds else None)


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        pytest.param(3, 70, 90, id="few-rows"),
        pytest.param(70, 9, 90, id="few-columns"),
        pytest.param(70, 32, 32, id="small"),
    ],
)
def test_small_products_round_nothing_under_autocast(m: int, n: int, k: int) -> None:
    lhs, rhs = torch.randn(m, k), torch.randn(k, n)
    expected = multiply(lhs, rhs)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multiply(lhs, rhs), expected)


@needs_avx512
@pytest.mark.usefixtures("_restored_threads", "_in_pairs_or_floats")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_rounded_sums_do_not_depend_on_threads_or_rows(num_threads: int) -> None:
    lhs, rhs = torch.randn(500, 2500), torch.randn(2500, 147)
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_num_threads(2)
        expected = multiply(lhs, rhs)

        torch.set_num_threads(num_threads)
        assert torch.equal(multiply(lhs, rhs), expected)
        assert torch.equal(multiply(lhs[37:330], rhs), expected[37:330])


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
def test_rounded_products_write_past_the_caches_and_keep_what_is_not_finite() -> None:
    lhs, rhs = torch.randn(70, 65), torch.randn(65, 96)
    lhs[7, 64], rhs[3, 44] = inf, nan
    plain, streamed = torch.empty(70, 96), torch.empty(70, 96)

    with torch.autocast("cpu", torch.bfloat16):
        multiply_all([Product(lhs, rhs, plain)])
        multiply_all([Product(lhs, rhs, streamed)], streams=True)

    assert_close(streamed, plain, rtol=0, atol=0, equal_nan=True)
    keeps_row, keeps_column = torch.arange(70) != 7, torch.arange(96) != 44
    assert plain.isfinite().equal(keeps_row.unsqueeze(1) & keeps_column)


HALVES: Final = tuple(product((torch.float32, torch.bfloat16), repeat=3))[1:]


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("dtypes", HALVES, ids=str)
def test_matrices_may_be_kept_in_bfloat16(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], adds: bool
) -> None:
    # The last are summed in pieces.
    sizes = [*list_sizes(1), (66, 65, 1500), (66, 65, 4200)]
    for (left, right), (m, n, k) in zip(cycle(product(LAYOUTS, LAYOUTS)), sizes):
        lhs = LAYOUTS[left](2, m, k).to(dtypes[0])
        rhs = LAYOUTS[right](2, k, n).to(dtypes[1])
        old = torch.randn(2, m, n).to(dtypes[2])
        # Lines of the cache, and others.
        out = old.clone() if adds else torch.full((2, m, n), nan, dtype=dtypes[2])

        multiply_all([Product(lhs, rhs, out)], adds=adds, streams=m % 2 == 0)

        if torch.bfloat16 in dtypes[:2]:
            lhs, rhs = lhs.bfloat16(), rhs.bfloat16()
        check_rounded(lhs, rhs, out, old if adds else None)


def check_rounded(lhs: Tensor, rhs: Tensor, actual: Tensor, old: Tensor | None) -> None:
    """Check a product as :func:`check_product` does, but for one rounding of it."""
    if actual.dtype == torch.float32:
        check_product(lhs, rhs, actual, old)
        return

    expected = lhs.double() @ rhs.double() + (0 if old is None else old.double())
    # Half a unit in the last of 8 places; the rest is for sums in float32.
    assert_close(actual.double(), expected, rtol=2**-8, atol=1e-3)


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
def test_nothing_beside_a_result_in_bfloat16_is_touched() -> None:
    for m, n, k in list_sizes(3):
        matrices = torch.full((2, m + 3, n + 21), GUARD, dtype=torch.bfloat16)
        out = matrices[:, 1 : m + 1, 4 : n + 4]
        lhs, rhs = torch.randn(2, m, k), torch.randn(2, k, n)

        multiply_all([Product(lhs, rhs, out)])

        check_rounded(lhs, rhs, out, None)
        out.fill_(GUARD)
        assert (matrices == GUARD).all()


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
def test_rows_of_experts_are_kept_in_bfloat16() -> None:
    counts = [5, 0, 2500, 33]
    rows = torch.randn(sum(counts), 2 * 20, dtype=torch.bfloat16)
    grads = torch.randn(sum(counts), 2 * 36, dtype=torch.bfloat16)
    weight = torch.randn(4, 2, 20, 36, dtype=torch.bfloat16)
    out, of_weight = torch.empty_like(grads), torch.empty_like(weight)
    # Others in the same call
    others = torch.randn(sum(counts), 2 * 6, dtype=torch.bfloat16)
    narrow = torch.randn(4, 2, 20, 6, dtype=torch.bfloat16)
    other_out, of_narrow = torch.empty_like(others), torch.empty_like(narrow)

    multiply_rows(
        [RowProduct(rows, weight, out), RowProduct(rows, narrow, other_out)], counts
    )
    multiply_columns(
        [
            ColumnProduct(rows, grads, of_weight),
            ColumnProduct(rows, others, of_narrow),
        ],
        counts,
    )

    begin = 0
    for expert, count in enumerate(counts):
        # (C_e,G*D) -> (G,C_e,D)
        x, y, g = (
            t[begin : begin + count].unflatten(1, (2, -1)).transpose(0, 1)
            for t in (rows, out, grads)
        )
        check_rounded(x, weight[expert], y, None)
        check_rounded(x.mT, g, of_weight[expert], None)
        y, g = (
            t[begin : begin + count].unflatten(1, (2, -1)).transpose(0, 1)
            for t in (other_out, others)
        )
        check_rounded(x, narrow[expert], y, None)
        check_rounded(x.mT, g, of_narrow[expert], None)
        begin += count


@needs_avx512
def test_products_of_several_types_are_refused() -> None:
    lhs, rhs, out = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)

    with pytest.raises(
        ValueError, match="`products` must have left factors of one type"
    ):
        multiply_all([Product(lhs, rhs, out), Product(lhs.bfloat16(), rhs, out)])


@needs_avx512
def test_factors_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="`rhs` must be float32 or bfloat16, but is"):
        multiply_all(
            [Product(torch.ones(2, 3), torch.ones(3, 4).double(), torch.ones(2, 4))]
        )


# How many numbers beyond the diagonal are read: those of a panel of rows.
BEYOND_DIAGONAL: Final = 16

# The sides of squares, and the other dimension.
SQUARES: Final = (
    *product((1, 2, 13, 15, 29, 64, 70, 113), (5, 32, 40)),
    *((257, 64), (300, 96)),
)

# By the number of pieces in which float32 is summed.
LONG_SQUARES: Final = {1: (1100, 7), 2: (1200, 7), 3: (2500, 7)}


def make_half(triangle: Triangle, layout: str, num: int) -> Tensor:
    """Make squares that are 0 next to the diagonal, and not finite beyond that."""
    square = LAYOUTS[layout](2, num, num)
    if triangle == Triangle.LOWER_LEFT:
        return square.tril() + torch.full((num, num), nan).triu(BEYOND_DIAGONAL + 1)

    return square.triu() + torch.full((num, num), nan).tril(-BEYOND_DIAGONAL - 1)


def multiply_triangles(
    products: Sequence[Product], triangles: Sequence[Triangle], *, adds: bool = False
) -> None:
    numbers = array("q")
    for lhs, rhs, out in products:
        numbers.extend((*lhs.shape[:2], rhs.size(2), lhs.size(2)))
        for x in (lhs, rhs, out):
            numbers.extend((x.data_ptr(), *x.stride()))
        numbers.pop()

    assert len(numbers) == NUM_NUMBERS * len(products)
    halves = find_halves(products, [x.out for x in products])
    multiply_described(
        numbers, triangles=array("q", triangles), halves=halves, adds=adds
    )


def make_triangular_products(
    layout: str, dtypes: Sequence[torch.dtype], num_pieces: int
) -> tuple[list[Product], list[Triangle]]:
    """Make products of each kind, in turn with whole ones."""
    wanted, triangles = [], []
    squares = (*SQUARES, LONG_SQUARES[num_pieces])
    for (num, other), triangle in product(squares, Triangle):
        if triangle in (Triangle.LOWER_LEFT, Triangle.UPPER_LEFT):
            lhs = make_half(triangle, layout, num)
            rhs = LAYOUTS[layout](2, num, other)
        else:
            lhs, rhs = LAYOUTS[layout](2, num, other), LAYOUTS[layout](2, other, num)
        out = torch.randn(2, num, rhs.size(-1) + 3)[..., :-3]

        tensors = (
            x.to(dtype) for x, dtype in zip((lhs, rhs, out), dtypes, strict=True)
        )
        wanted.append(Product(*tensors))
        triangles.append(triangle)

    return wanted, triangles


def check_triangular_product(
    product: Product, triangle: Triangle, old: Tensor, *, adds: bool
) -> None:
    lhs, rhs, out = product
    if torch.bfloat16 in (lhs.dtype, rhs.dtype):
        lhs, rhs = lhs.bfloat16(), rhs.bfloat16()
    if triangle == Triangle.LOWER_LEFT:
        lhs = lhs.tril()
    if triangle == Triangle.UPPER_LEFT:
        lhs = lhs.triu()
    before = old if adds else torch.zeros_like(old)
    if triangle != Triangle.LOWER_RESULT:
        check_rounded(lhs, rhs, out, before)
        return

    # Tiles that the diagonal does not cut are left alone.
    assert torch.equal(out.triu(14 + 32), old.triu(14 + 32))
    expected = (lhs.double() @ rhs.double() + before).to(out.dtype)
    is_lower = torch.ones_like(out[0], dtype=torch.bool).tril()
    check_rounded(lhs, rhs, torch.where(is_lower, out, expected), before)


@needs_avx512
@pytest.mark.parametrize("adds", [False, True], ids=["sets", "adds"])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_halves_of_squares_are_read_or_written(layout: str, adds: bool) -> None:
    # Layouts differ in how factors are copied, which is the same in each piece.
    num_pieces = 3 if layout == "rows" else 2
    wanted, triangles = make_triangular_products(
        layout, [torch.float32] * 3, num_pieces
    )
    old = [out.clone() for *_, out in wanted]

    multiply_triangles(wanted, triangles, adds=adds)

    for x, triangle, before in zip(wanted, triangles, old, strict=True):
        check_triangular_product(x, triangle, before, adds=adds)


@needs_avx512
@pytest.mark.usefixtures("_in_pairs_or_floats")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtypes", HALVES, ids=str)
def test_halves_of_squares_may_be_kept_in_bfloat16(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], layout: str
) -> None:
    # Several sums of bfloat16 would be rounded.
    wanted, triangles = make_triangular_products(layout, dtypes, 1)
    old = [out.clone() for *_, out in wanted]

    multiply_triangles(wanted, triangles)

    for x, triangle, before in zip(wanted, triangles, old, strict=True):
        check_triangular_product(x, triangle, before, adds=False)


@needs_avx512
@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 3, 8])
def test_halves_of_squares_do_not_depend_on_threads_or_other_products(
    num_threads: int, left: torch.dtype
) -> None:
    wanted, triangles = make_triangular_products("rows", [left, left, torch.float32], 3)
    torch.set_num_threads(2)
    for x, triangle in zip(wanted, triangles, strict=True):
        multiply_triangles([x], [triangle])
    expected = [out.clone() for *_, out in wanted]

    torch.set_num_threads(num_threads)
    multiply_triangles(wanted, triangles)

    for (*_, out), triangle, one in zip(wanted, triangles, expected, strict=True):
        is_lower = triangle == Triangle.LOWER_RESULT
        assert torch.equal(*(x.tril() if is_lower else x for x in (out, one)))


@pytest.mark.parametrize(
    ("vendor", "has_pairs", "expected"),
    [
        ("AuthenticAMD", True, False),
        ("AuthenticAMD", False, True),
        ("GenuineIntel", True, True),
        (None, True, False),
    ],
)
def test_bfloat16_is_widened_where_pairs_are_slower_or_not_multiplied(
    vendor: str | None,
    has_pairs: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "find_vendor", lambda: vendor)
    monkeypatch.setattr(products, "multiplies_pairs", lambda: has_pairs)
    # The scan asks, too, where products cannot be compiled.
    monkeypatch.delattr(products, "find_function")
    monkeypatch.setattr(
        products, "widens_bfloat16", products.widens_bfloat16.__wrapped__
    )

    assert products.widens_bfloat16() == expected
    assert (Rounding.WIDENS in rounding_now()) == expected


@pytest.mark.parametrize(
    ("dtype", "rounding", "expected"),
    [
        (torch.float32, Rounding(0), "float"),
        (torch.float32, Rounding.WIDENS, "float"),
        (torch.float32, Rounding.ROUNDS, "rounded"),
        (torch.float32, Rounding.ROUNDS | Rounding.WIDENS, "rounded_widened"),
        (torch.float64, Rounding.ROUNDS | Rounding.WIDENS, "double"),
        (torch.bfloat16, Rounding.ROUNDS, "bfloat16"),
        (torch.bfloat16, Rounding.WIDENS, "bfloat16_widened"),
    ],
)
def test_functions_are_named_after_types_and_rounding(
    dtype: torch.dtype, rounding: Rounding, expected: str
) -> None:
    assert find_suffix(dtype, rounding) == expected
