"""Tests of moxe_plugin/allocator.py, in processes that import nothing else."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from moxe_plugin.allocator import keep_freed_memory

_COUNT_FAULTS: Final = """\
import ctypes, resource, sys
from moxe_plugin.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() is None
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(4):
    for num_mib in (48, 64, 40):
        block = libc.malloc(num_mib << 20)
        ctypes.memset(block, 1, num_mib << 20)
        libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
"""Uses blocks of several sizes, four times, and prints the page faults so far."""

_TRY_TWICE: Final = """\
from moxe_plugin.allocator import is_freed_memory_kept, keep_freed_memory
for _ in range(2):
    print(is_freed_memory_kept(), keep_freed_memory())
print(is_freed_memory_kept())
"""

_TRY_WITHOUT_MEMORY: Final = """\
from moxe_plugin import allocator
allocator._TRIAL_BYTES = 2**62
try:
    allocator.is_freed_memory_kept()
except MemoryError as ex:
    print(ex)
"""

_OTHER_ALLOCATOR: Final = """\
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
static char *next, *end;
void *memalign(size_t alignment, size_t size) {
    if (!next) {
        size_t room = (size_t)8 << 30;
        next = mmap(0, room, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        end = next + room;
    }
    if (alignment < 16) alignment = 16;
    size_t at = ((size_t)next + 16 + alignment - 1) & ~(alignment - 1);
    if (size > (size_t)end - at) return 0;
    ((size_t *)at)[-1] = size;
    next = (char *)at + size;
    return (void *)at;
}
void *malloc(size_t size) { return memalign(16, size); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **out, size_t alignment, size_t size) {
    return (*out = memalign(alignment, size)) ? 0 : ENOMEM;
}
void *calloc(size_t count, size_t size) { return memalign(16, count * size); }
void *realloc(void *old, size_t size) {
    void *new = memalign(16, size);
    if (old && new) {
        size_t old_size = ((size_t *)old)[-1];
        memcpy(new, old, old_size < size ? old_size : size);
    }
    return new;
}
void free(void *block) {}
"""
"""Takes from a pool, and keeps all."""

_JUMP: Final = """\
#include <stddef.h>
extern void *__libc_malloc(size_t);
void *malloc(size_t num_bytes) { return __libc_malloc(num_bytes); }
"""
"""Has glibc allocate, at another address than its own, as Debian's Python does."""

_GLIBC_SETTINGS: Final = (
    *("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
    *("GLIBC_TUNABLES", "LD_PRELOAD"),
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _GLIBC_SETTINGS:
        monkeypatch.delenv(name, raising=False)


def _run(code: str, *args: str, env: Mapping[str, str] | None = None) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **(env or {})},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )

    return process.stdout.splitlines()


def test_blocks_of_freed_memory_cost_no_more_page_faults() -> None:
    kept, returned = (
        [int(line) for line in _run(_COUNT_FAULTS, which)]
        for which in ("kept", "system")
    )

    num_pages = (48 + 64 + 40) * 2**20 // os.sysconf("SC_PAGE_SIZE")

    if returned[1] - returned[0] < num_pages:
        pytest.skip("This system hands out pages of more than the usual size.")

    assert returned[3] - returned[0] >= 3 * num_pages
    assert kept[3] - kept[0] < num_pages // 100


def test_the_second_call_changes_nothing() -> None:
    assert _run(_TRY_TWICE) == ["False None", "True None", "True"]


@pytest.mark.parametrize(
    ("name", "value", "reason", "is_kept"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "0", "`MALLOC_TRIM_THRESHOLD_`", False),
        ("MALLOC_MMAP_THRESHOLD_", "1", "`MALLOC_MMAP_THRESHOLD_`", False),
        (
            "GLIBC_TUNABLES",
            "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736",
            "`GLIBC_TUNABLES=glibc.malloc.mmap_max=0`",
            True,
        ),
    ],
    ids=["trim_threshold", "mmap_threshold", "tunables"],
)
def test_what_the_environment_says_is_left_as_it_is(
    name: str, value: str, reason: str, is_kept: bool
) -> None:
    message = f"the environment sets {reason}"

    assert _run(_TRY_TWICE, env={name: value}) == [
        f"{is_kept} {message}",
        f"{is_kept} {message}",
        f"{is_kept}",
    ]


def test_other_settings_of_the_environment_do_not_matter() -> None:
    env = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "MALLOC_ARENA_MAX": "2"}

    assert _run(_TRY_TWICE, env=env)[1:] == ["True None", "True"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(_OTHER_ALLOCATOR, "another allocator than glibc's", id="other"),
        pytest.param(_JUMP, "None", id="jump"),
    ],
)
def test_another_allocator_is_told(code: str, expected: str, tmp_path: Path) -> None:
    library = tmp_path / "liballocator.so"
    source = library.with_suffix(".c")
    source.write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    first, *_ = _run(_TRY_TWICE, env={"LD_PRELOAD": str(library)})

    assert first.endswith(expected)


def test_another_c_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)

    assert keep_freed_memory() == "the C library is not glibc"


def test_refused_parameter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free

        @staticmethod
        def mallopt(number: int, value: int) -> int:
            return int((number, value) == (-4, 0))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)

    assert keep_freed_memory() == "glibc refuses `M_TRIM_THRESHOLD`"


def test_trial_without_memory_says_so() -> None:
    # Not in this process: after a failure, glibc gives the thread another arena.
    assert _run(_TRY_WITHOUT_MEMORY) == [f"There are no {2**62} bytes for a trial."]
