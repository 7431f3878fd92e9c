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
    # Blocks run the scan in float32.
    dtypes = {"slstm": torch.bfloat16, "scan": torch.float32}
    # Of many sequences, programs of the sLSTM take 8 segments instead of 4.
    many = [x for x in list_kernel_cases(batch=64, length=4) if x.kernel == "slstm"]
    for case in (*list_kernel_cases(batch=1, length=64), *many):
        if case.system == "moxe" and case.phase == "train" and case.kernel in dtypes:
            dtype = dtypes[case.kernel]
            prepare_kernel_calls(case, dtype, torch.device("cpu"), seed=1).kernel()


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    """Tell what each launch has been compiled to."""
    return compile_launches(launch_kernels, tmp_path_factory.mktemp("triton"))


def test_kernels_compile_and_fit(launches: list[Launch]) -> None:
    slstm = ["slstm_forward", "slstm_backward"]
    names = [*slstm, "forward", "backward", *slstm]
    assert [x.kernel for x in launches] == [f"{x}_kernel" for x in names]
    assert max(x.shared for x in launches) <= SHARED_BYTES
    # As an H100 does fastest, where R stays on chip
    in_groups = [x.kernel.startswith("slstm") for x in launches]
    assert [x.multiplies_in_groups for x in launches] == in_groups


def test_a_step_of_the_slstm_moves_no_tile(launches: list[Launch]) -> None:
    """Look for what the docstring of `slstm_rows_tiles` says of threads."""
    assert [x.num_moves for x in (*launches[:2], *launches[4:])] == [0] * 4
    # Those of the scan in float32 are what is counted where there are some.
    assert launches[2].num_moves > 0


def test_threads_of_the_scan_see_what_others_wrote(launches: list[Launch]) -> None:
    """Look for what the docstring of `slstm_kernels` relies on."""
    scans = launches[2:4]

    assert not any(x.reads_incoherently for x in scans)
    assert [x.num_barriers for x in scans] == [2, 1]
