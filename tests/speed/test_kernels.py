"""The benchmark of kernels, but for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moxe_plugin.report.files import read_json
from moxe_plugin.speed import kernels
from moxe_plugin.speed.kernel_cases import (
    Kernel,
    KernelCase,
    Phase,
    list_kernel_cases,
)
from moxe_plugin.speed.kernel_measuring import KernelOptions, KernelRow, measure_kernel

OPTIONS = KernelOptions(
    dtype="float32",
    repeats=2,
    warm_up=0,
    matmul_gflop_per_s=100.0,
    copy_gb_per_s=10.0,
)


def make_case(kernel: Kernel, phase: Phase) -> KernelCase:
    """Make a tiny case."""
    return KernelCase(
        kernel=kernel,
        phase=phase,
        system="tiny",
        num_experts=2,
        num_rows=3,
        length=5,
        num_heads=2,
        dim=16,
    )


def test_cases_are_table_1() -> None:
    cases = list_kernel_cases(64, 256)

    assert len(cases) == 12
    assert {x.phase for x in cases} == {"forward", "train"}

    for kernel in ("mlstm", "slstm", "scan"):
        moxe, xlstm = (x for x in cases if x.kernel == kernel and x.phase == "forward")
        # MoxE: four experts of 4 heads, and to each a quarter of the tokens
        factor = 2 if kernel == "mlstm" else 1
        assert moxe.num_heads * moxe.dim == factor * 640
        assert moxe.num_experts * moxe.num_rows * moxe.length == 64 * 256
        # The xLSTM: 8 heads
        assert xlstm.num_heads * xlstm.dim == factor * 1024
        assert xlstm.num_rows * xlstm.length == 64 * 256


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [(0, 4, "`batch` must be at least 1"), (1, 6, "`length` must be a multiple of 4")],
)
def test_shapes_that_are_not_possible_are_named(
    batch: int, length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list_kernel_cases(batch, length)


def test_mlstm_counts_are_those_of_blocks_of_pairs() -> None:
    case = replace(
        make_case("mlstm", "forward"),
        num_experts=1,
        num_rows=1,
        num_heads=1,
        length=64,
        dim=320,
    )

    # One block: q k^T and P v; q, k, v and h in bfloat16
    assert case.count_gflop() == 2 * 2 * 64**2 * 320 / 1e9
    assert case.count_gbytes(2) == 4 * 64 * 320 * 2 / 1e9

    # Two on the diagonal and one below
    two = replace(case, length=65)
    assert two.count_gflop() == pytest.approx(3 * case.count_gflop())

    # Two products for dq, and two each for dk and dv
    train = replace(case, phase="train")
    assert train.count_gflop() == pytest.approx(4 * case.count_gflop())
    assert train.count_gbytes(2) == (4 + 5 + 6) * 64 * 320 * 2 / 1e9


def test_slstm_counts_are_those_of_its_steps() -> None:
    case = make_case("slstm", "forward")

    # 60 steps of cells, each a product with R (16,64)
    assert case.count_gflop() == 60 * 2 * 16 * 64 / 1e9
    # Gates of 64 and outputs of 16 in bfloat16; R of four cells
    assert case.count_gbytes(2) == (60 * (64 + 16) * 2 + 4 * 16 * 64 * 2) / 1e9

    train = replace(case, phase="train")
    assert train.count_gflop() == pytest.approx(3 * case.count_gflop())
    # Activations and c in float32, all else in bfloat16
    saved, read = 5 * 16 * 4 + 16 * 2, 5 * 16 * 4 + 16 * 2
    written, for_r = 4 * 16 * 2, 5 * 16 * 2
    assert train.count_gbytes(2) == pytest.approx(
        case.count_gbytes(2)
        + (60 * (saved + read + written + for_r) + 2 * 4 * 16 * 64 * 2) / 1e9
    )


def test_scan_counts_are_those_of_its_steps() -> None:
    case = make_case("scan", "forward")

    assert case.count_gflop() == make_case("slstm", "forward").count_gflop()
    # As above, but all is float32
    assert case.count_gbytes(4) == (60 * (64 + 16) + 4 * 16 * 64) * 4 / 1e9

    train = replace(case, phase="train")
    saved, read, written, for_r = 5 * 16, 7 * 16, 4 * 16, 5 * 16
    assert train.count_gbytes(4) == pytest.approx(
        case.count_gbytes(4)
        + (60 * (saved + read + written + for_r) + 2 * 4 * 16 * 64) * 4 / 1e9
    )
    # In 16 bits R stays on chip, as in training.
    in_training = replace(train, kernel="slstm")
    assert train.count_gbytes(2) == in_training.count_gbytes(2)


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("mlstm", "float32"),
        ("mlstm", "bfloat16"),
        ("slstm", "bfloat16"),
        ("scan", "float32"),
        ("scan", "bfloat16"),
    ],
)
def test_kernels_and_references_compute_the_same(
    kernel: Kernel, dtype: str, phase: Phase, device: torch.device
) -> None:
    pytest.importorskip("triton")
    case = make_case(kernel, phase)

    row = measure_kernel(case, replace(OPTIONS, dtype=dtype), device)

    # A rounding to bfloat16 is 2**-9 = 0.002, and the interpreter's is 0.004.
    assert 0.0 <= row.error < (1e-4 if dtype == "float32" else 0.02)
    assert len(row.seconds) == len(row.reference_seconds) == 2
    assert len(row.call_seconds) == len(row.reference_call_seconds) == 2
    median, size = sum(row.seconds) / 2, 4 if dtype == "float32" else 2
    assert row.matmul_fraction == pytest.approx(case.count_gflop() / median / 100.0)
    assert row.copy_fraction == pytest.approx(case.count_gbytes(size) / median / 10.0)


def test_a_wrong_kernel_shows_in_the_error(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    mlstm_rows = pytest.importorskip("moxe_plugin.nn.triton.mlstm_rows")
    monkeypatch.setattr(mlstm_rows, "mlstm_rows", lambda q, *_: q.clone())

    row = measure_kernel(make_case("mlstm", "forward"), OPTIONS, device)

    assert row.error > 0.1


def test_record_and_page_say_what_was_measured(tmp_path: Path) -> None:
    row = KernelRow(
        case=make_case("mlstm", "forward"),
        seconds=[0.002, 0.002],
        reference_seconds=[0.011, 0.009],
        call_seconds=[0.004, 0.006],
        reference_call_seconds=[0.01, 0.01],
        error=1e-3,
        gflop=0.05,
        gbytes=0.003,
        matmul_fraction=0.25,
        copy_fraction=0.15,
    )

    kernels.write_kernels(
        tmp_path / "new",
        "name",
        {"gpu": "G", "torch": "2.9", "triton": "3.5"},
        OPTIONS,
        [row],
    )

    record = read_json(tmp_path / "new" / "name.json")
    assert record["rows"][0]["ratio"] == pytest.approx(5.0)
    assert record["rows"][0]["call_ratio"] == pytest.approx(2.0)
    assert record["rows"][0]["case"]["kernel"] == "mlstm"
    assert record["options"]["copy_gb_per_s"] == 10.0

    page = (tmp_path / "new" / "name.md").read_text(encoding="utf-8")
    cells = [x.strip() for x in page.split("| mlstm of tiny")[1].split("|")[1:12]]
    assert cells == [
        *("forward", "2 x 3 x 5 x 2 x 16", "2", "10", "5.00", "5", "2.00"),
        *("2", "15%", "25%", "1.0e-03"),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command_measures_all_cases(
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    pytest.importorskip("triton")
    cases = [make_case(x, "forward") for x in ("mlstm", "slstm", "scan")]
    monkeypatch.setattr(kernels, "_find_gpu", lambda: (device, "a CPU"))
    monkeypatch.setattr(kernels, "_MATMUL_SIZE", 64)
    monkeypatch.setattr(kernels, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(
        "moxe_plugin.speed.kernel_cases.list_kernel_cases", lambda *_: cases
    )

    arguments = ["--dtype", dtype, "--repeats", "1", "--name", "all"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0

    captured = capsys.readouterr()
    names = ["mlstm of tiny", "slstm of tiny", "scan of tiny"]
    if dtype == "float32":
        names.remove("slstm of tiny")
        assert "slstm of tiny, forward: left out, as R, of torch.f" in captured.err
    assert [x.partition(",")[0] for x in captured.out.splitlines()] == names

    record = read_json(tmp_path / "all.json")
    assert record["machine"]["gpu"] == "a CPU"
    assert record["machine"]["triton"]
    assert record["options"]["matmul_size"] == 64
    assert record["options"]["copy_gb_per_s"] > 0.0
    assert len(record["rows"]) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--out", str(tmp_path)]) == 2

    assert "can be timed on a GPU only" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interpreter_is_not_timed_on_a_gpu_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    assert kernels.main(["--out", str(tmp_path)]) == 2

    assert "`TRITON_INTERPRET` must not be set" in capsys.readouterr().err
