"""Compile and load the C++ of this package."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn.native.processor import multiplies_pairs

NativeSource: TypeAlias = Literal[
    "causal_conv",
    "cross_entropy",
    "gating",
    "mlstm_block",
    "mlstm_chunkwise",
    "mlstm_parallel",
    "mlstm_projections",
    "products",
    "router",
    "row_dispatch",
    "scale_norm",
    "slstm_block",
    "slstm_scan",
]
"""The C++ files, without their ending."""

_AVX2: Final = ("-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c")
_AVX512: Final = (
    "-DCPU_CAPABILITY_AVX512",
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
)
_CAPABILITY_FLAGS: Final[Mapping[str, Sequence[str]]] = {
    "AVX2": _AVX2,
    "AVX512": _AVX512,
}

SUFFIXES: Final = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
}
"""How the functions for each type end. Those for bfloat16, in which numbers are only
kept, are compiled for processors with AVX-512."""

_TIMEOUT_S: Final = 300


class NativeLibraryError(RuntimeError):
    """The C++ code cannot be compiled or loaded here; the text says why."""


def is_readable(x: Tensor) -> bool:
    """Tell whether C++ can read a tensor by its address.

    :param x: The tensor.

    :returns: Whether it is on the CPU and no subclass (DTensor, FakeTensor …), which
        has no memory to point to.
    """
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter)


def int64_array(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Copy numbers to where C++ can read them.

    :param numbers: The numbers.

    :returns: The array, which lives as long as it is held.
    """
    return (ctypes.c_int64 * len(numbers))(*numbers)


def pointers_to(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Tell C++ where tensors are.

    :param tensors: The tensors, which live until the call returns: the caller holds
        them. ``None`` becomes null.

    :returns: The address of each.
    """
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


@cache
def load_library(source: NativeSource) -> ctypes.CDLL:
    """Compile a C++ file, unless a cache holds it already, and load it.

    The cache is ``native/`` in ``MOXE_CACHE_DIR``, by default that of the user. The
    compiler is ``$CXX``, by default ``g++``.

    :param source: Which file.

    :returns: The library.

    :raises NativeLibraryError: There is no compiler that can compile it.
    """
    # At module level it would make each import of this package slow.
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = get_cxx_compiler()
    command = [compiler, *_flags()]

    code = Path(__file__).with_name(f"{source}.cpp")
    path = library_dir() / f"{source}-{_digest(command, code)}.so"

    if not path.is_file():
        _compile(command, code, path)

    try:
        return ctypes.CDLL(str(path))
    except OSError as ex:
        raise NativeLibraryError(f"'{path}' cannot be loaded: {ex}") from ex


@cache
def find_function(source: NativeSource, name: str) -> Any:
    """Find a function of a library, which takes ctypes long to look up.

    :param source: Which C++ file.
    :param name: Its name there.

    :returns: The function, which returns a C ``int``.

    :raises NativeLibraryError: As :func:`load_library`.
    """
    return load_library(source)[name]


@cache
def why_not_loaded(source: NativeSource) -> str | None:
    """Tell why a library is of no use here.

    :param source: Which C++ file.

    :returns: The reason; ``None`` if it can be used.
    """
    try:
        load_library(source)
    except NativeLibraryError as ex:
        return str(ex)

    return None


def library_dir() -> Path:
    """Tell where compiled libraries are kept.

    :returns: ``native/`` in ``MOXE_CACHE_DIR``, by default in the user's cache.
    """
    if directory := os.environ.get("MOXE_CACHE_DIR"):
        return Path(directory) / "native"

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"

    return Path(base) / "moxe_plugin" / "native"


def _flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    # ATen's vectors are as wide as the code says that is compiled with them.
    capability = torch.backends.cpu.get_cpu_capability()

    return [
        *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
        f"-DCPU_CAPABILITY={capability}",
        *_CAPABILITY_FLAGS.get(capability, ()),
        *(("-mavx512bf16",) if multiplies_pairs() else ()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{directory}" for directory in include_paths("cpu")),
    ]


def _digest(command: Sequence[str], code: Path) -> str:
    text = "\n".join([torch.__version__, *command])
    # All headers of this package, which a file may include.
    parts = [path.read_bytes() for path in (*sorted(code.parent.glob("*.h")), code)]

    return hashlib.sha256(b"\0".join([text.encode(), *parts])).hexdigest()[:16]


def _compile(command: Sequence[str], code: Path, path: Path) -> None:
    from torch.utils.cpp_extension import library_paths

    libraries = [f"-L{directory}" for directory in library_paths("cpu")]

    try:
        path.parent.mkdir(parents=True, exist_ok=True)

        # Other processes may do the same: the last one to rename wins, and no one reads
        # a file that is not complete.
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            built = Path(directory) / path.name
            subprocess.run(
                [
                    *(*command, str(code), "-o", str(built)),
                    *(*libraries, "-ltorch_cpu", "-lc10"),
                ],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            built.replace(path)
    except FileNotFoundError as ex:
        raise NativeLibraryError(
            f"there is no C++ compiler '{command[0]}' (install g++, or set CXX)"
        ) from ex
    except subprocess.CalledProcessError as ex:
        raise NativeLibraryError(f"'{command[0]}' failed: {ex.stderr.strip()}") from ex
    except (OSError, subprocess.TimeoutExpired) as ex:
        raise NativeLibraryError(f"'{path}' cannot be made: {ex}") from ex
