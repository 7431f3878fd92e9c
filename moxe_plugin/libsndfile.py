"""Gives fairseq2n the ``libsndfile.so.1`` that it needs, without root.

fairseq2n looks for the library in the system and in ``<prefix>/lib``; the wheel
``soundfile`` carries it under another name. Imports nothing of fairseq2, which fails
to import while the library is missing: ``python -m moxe_plugin.libsndfile``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import site
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

LIBRARY_NAME: Final = "libsndfile.so.1"


def find_libsndfile() -> str | None:
    """Find the library where fairseq2n looks for it.

    :returns: The name or path under which it loads; ``None`` if there is none.
    """
    # In a Conda environment fairseq2n does not look in the system.
    names = [] if "CONDA_PREFIX" in os.environ else [LIBRARY_NAME]

    for name in names + [str(path) for path in _prefix_paths()]:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name

    return None


def link_libsndfile() -> str:
    """Make the library of ``soundfile`` available to fairseq2n if none is found.

    :returns: The name or path under which it loads.

    :raises OSError: ``soundfile`` carries no library for this machine, or it cannot
        be linked.
    """
    name = find_libsndfile()
    if name is not None:
        return name

    bundled = _bundled_path()
    # <prefix>/lib of the environment that holds `soundfile`
    link = bundled.parents[3] / LIBRARY_NAME
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(bundled, link.parent))

    name = find_libsndfile()
    if name is None:
        raise OSError(f"'{link}' was made, but fairseq2 does not find it there.")

    return name


def _prefix_paths() -> list[Path]:
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []

    # <prefix>/lib/python3.x/site-packages -> <prefix>/lib
    return [Path(d).parents[1] / LIBRARY_NAME for d in user + site.getsitepackages()]


def _bundled_path() -> Path:
    machine = platform.machine()
    spec = find_spec("_soundfile_data")
    origin = None if spec is None else spec.origin

    if origin is not None:
        path = Path(origin).parent / f"libsndfile_{machine}.so"
        if path.is_file():
            return path

    raise OSError(
        f"The package `soundfile` carries no libsndfile for {sys.platform} on "
        f"{machine}. Install the library with the package manager of the system."
    )


if __name__ == "__main__":
    print(f"libsndfile: {link_libsndfile()}")  # noqa: T201  # the command's answer
