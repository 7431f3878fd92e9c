"""Lets a process keep the memory that it has freed, for what it computes next.

glibc asks the system for every large block and returns it as soon as it is freed. A
training step on a CPU frees gigabytes and asks for them again, and the system clears
each page that it hands out. Imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
from resource import RUSAGE_THREAD, getrusage
from typing import Final

_SETTINGS: Final = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
"""Number and value of parameters of mallopt(3), by their names in ``malloc.h``: no
block is mapped by itself, and the heap never shrinks; -1 becomes the largest size."""

_VARIABLES: Final = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
"""With which a user tells glibc the same or the contrary; see mallopt(3)."""

_TUNABLES: Final = tuple(
    f"glibc.malloc.{name}=" for name in ("mmap_max", "mmap_threshold", "trim_threshold")
)
"""The same in ``GLIBC_TUNABLES``."""

_TRIAL_BYTES: Final = 64 * 2**20
"""More than the largest block for which glibc learns to keep memory by itself."""

_LARGEST_PAGE_BYTES: Final = 2 * 2**20
"""What one page fault provides at most."""


def keep_freed_memory() -> str | None:
    """Let glibc keep freed memory until the process ends.

    That of the main thread, in which a model on a CPU computes and its gradients are
    computed, too: of another thread, blocks of less than 64 MiB are kept.

    What the environment says to glibc is left as it is. Calling it again changes
    nothing. ``malloc_trim(0)`` still returns to the system what is free at that moment.

    :returns: Why nothing was changed, as the end of a sentence; ``None`` if memory is
        kept.
    """
    return _find_obstacle() or _set_parameters()


def is_freed_memory_kept() -> bool:
    """Try whether a large block that was freed comes back without new pages.

    :returns: Whether it does, by whichever allocator and setting.
    """
    allocator = _load_allocator()

    num_faults = 0

    # The first block may be new in any case.
    for _ in range(2):
        num_faults_before = getrusage(RUSAGE_THREAD).ru_minflt

        block = allocator.malloc(_TRIAL_BYTES)
        if block is None:
            raise MemoryError(f"There are no {_TRIAL_BYTES} bytes for a trial.")

        ctypes.memset(block, 1, _TRIAL_BYTES)
        allocator.free(block)

        num_faults = getrusage(RUSAGE_THREAD).ru_minflt - num_faults_before

    return num_faults < _TRIAL_BYTES // _LARGEST_PAGE_BYTES // 2


def _find_obstacle() -> str | None:
    for name in _VARIABLES:
        if name in os.environ:
            return f"the environment sets `{name}`"

    for setting in os.environ.get("GLIBC_TUNABLES", "").split(":"):
        if setting.startswith(_TUNABLES):
            return f"the environment sets `GLIBC_TUNABLES={setting}`"

    try:
        glibc = ctypes.CDLL("libc.so.6")
    except OSError:
        return "the C library is not glibc"

    if not _allocates(glibc):
        return "the process has another allocator than glibc's"

    return None


class _MallInfo2(ctypes.Structure):
    """What mallinfo2(3) returns; of all arenas together."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocates(glibc: ctypes.CDLL) -> bool:
    allocator = _load_allocator()

    if _find_address(allocator) == _find_address(glibc):
        return True

    # In a program at a fixed address, as Debian's Python is, the address is that of a
    # jump to whatever is called.
    try:
        read_info = glibc.mallinfo2
    except AttributeError:  # before glibc 2.33
        return False

    read_info.restype = _MallInfo2

    def count_bytes() -> int:
        info = read_info()

        return int(info.uordblks + info.hblkhd)

    before = count_bytes()
    # Nobody touches it: it takes no memory.
    block = allocator.malloc(_TRIAL_BYTES)
    num_bytes = count_bytes() - before
    allocator.free(block)

    # Other threads may allocate meanwhile, but hardly as much.
    return num_bytes > _TRIAL_BYTES // 2


def _load_allocator() -> ctypes.CDLL:
    # Whichever library the process found first, such as one in `LD_PRELOAD`
    allocator = ctypes.CDLL(None)
    allocator.malloc.argtypes = [ctypes.c_size_t]
    allocator.malloc.restype = ctypes.c_void_p
    allocator.free.argtypes = [ctypes.c_void_p]
    allocator.free.restype = None

    return allocator


def _find_address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.malloc, ctypes.c_void_p).value


def _set_parameters() -> str | None:
    glibc = ctypes.CDLL("libc.so.6")

    for name, (number, value) in _SETTINGS.items():
        if glibc.mallopt(number, value) != 1:
            return f"glibc refuses `{name}`"

    return None
