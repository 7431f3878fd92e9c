"""Tests of `moxe_plugin.nn.native.library`."""

from __future__ import annotations

import shutil
from typing import get_args

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

from moxe_plugin.nn.native.library import NativeSource, why_not_loaded


@pytest.mark.skipif(
    shutil.which(get_cxx_compiler()) is None, reason="there is no C++ compiler"
)
@pytest.mark.parametrize("source", get_args(NativeSource))
def test_every_file_compiles_where_there_is_a_compiler(source: NativeSource) -> None:
    # Other tests skip what cannot be loaded.
    if source == "products" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("it needs AVX-512")

    assert why_not_loaded(source) is None
