"""Tests of `moxe_plugin.nn.native.library`."""

from __future__ import annotations

import shutil
from typing import get_args

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

from moxe_plugin.nn.native import library
from moxe_plugin.nn.native.library import NativeSource, why_not_loaded


@pytest.mark.skipif(
    shutil.which(get_cxx_compiler()) is None, reason="there is no C++ compiler"
)
@pytest.mark.parametrize("source", get_args(NativeSource))
def test_every_file_compiles_where_there_is_a_compiler(source: NativeSource) -> None:
    # Other tests skip what cannot be loaded.
    needs_avx512 = source in ("products", "mlstm_projections")
    if needs_avx512 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("it needs AVX-512")

    assert why_not_loaded(source) is None


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "expected"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)],
)
def test_products_of_bfloat16_need_avx512_as_well(
    capability: str,
    has_bfloat16: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)

    # As where `ATEN_CPU_CAPABILITY=avx2` forbids what the processor has
    assert ("-mavx512bf16" in library._flags()) == expected
