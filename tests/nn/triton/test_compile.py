"""Compile the kernels that are timed, at the widths of Table 1: see `compiling`.

Those of the mLSTM are in `test_mlstm_rows_compile`.
"""

from __future__ import annotations

import pytest
import torch

from moxe_plugin.speed.kernel_calls import prepare_kernel_calls
from moxe_plugin.speed.kernel_cases import list_kernel_cases
from tests.nn.triton.compiling import SHARED_BYTES, Launch, compile_launches

pytest.importorskip("triton")


def launch_kernels() -> None:
    """Launch the sLSTM with the widths of MoxE, which takes the largest tiles."""
    # Of many sequences, programs of the sLSTM take 8 segments instead of 4.
    for kernel, dtype, batch in (
        ("slstm", torch.bfloat16, 1),
        ("slstm", torch.bfloat16, 64),
        ("scan", torch.bfloat16, 1),
        ("scan", torch.bfloat16, 64),
        ("scan", torch.float32, 1),
    ):
        for case in list_kernel_cases(batch=batch, length=4):
            if (case.kernel, case.system, case.phase) == (kernel, "moxe", "train"):
                prepare_kernel_calls(case, dtype, torch.device("cpu"), seed=1).kernel()


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    """Tell what each launch has been compiled to."""
    return compile_launches(launch_kernels, tmp_path_factory.mktemp("triton"))


def test_kernels_compile_and_fit(launches: list[Launch]) -> None:
    names = [*["slstm_forward", "slstm_backward"] * 4, "forward", "backward"]
    assert [x.kernel for x in launches] == [f"{x}_kernel" for x in names]
    assert max(x.shared for x in launches) <= SHARED_BYTES
    # As an H100 does fastest, where R stays on chip
    in_groups = [x.kernel.startswith("slstm") for x in launches]
    assert [x.multiplies_in_groups for x in launches] == in_groups


def test_a_step_of_the_slstm_moves_no_tile(launches: list[Launch]) -> None:
    """Look for what the docstring of `slstm_rows_tiles` says of threads."""
    assert [x.num_moves for x in launches[:8]] == [0] * 8
    # Those of the scan in float32 are what is counted where there are some.
    assert launches[8].num_moves > 0


def test_threads_of_the_scan_see_what_others_wrote(launches: list[Launch]) -> None:
    """Look for what the docstring of `slstm_kernels` relies on."""
    scans = launches[8:]

    assert not any(x.reads_incoherently for x in scans)
    assert [x.num_barriers for x in scans] == [2, 1]
