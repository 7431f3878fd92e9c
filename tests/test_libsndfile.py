"""Tests of moxe_plugin/libsndfile.py."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moxe_plugin import libsndfile


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the prefix of an environment that has the wheel but no libsndfile."""
    bundled = libsndfile._bundled_path()
    site_packages = tmp_path / "lib" / "python3.x" / "site-packages"
    package = site_packages / "_soundfile_data"
    package.mkdir(parents=True)
    shutil.copy(bundled, package)

    # In a Conda environment the system, which may have the library, is not searched.
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(site_packages)])
    spec = ModuleSpec("_soundfile_data", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(libsndfile, "find_spec", lambda _: spec)

    return tmp_path


def test_link_gives_fairseq2n_the_library_of_the_wheel(prefix: Path) -> None:
    assert libsndfile.find_libsndfile() is None

    link = prefix / "lib" / "libsndfile.so.1"
    assert libsndfile.link_libsndfile() == str(link)
    assert libsndfile.find_libsndfile() == str(link)
    # The environment may be moved.
    assert not link.readlink().is_absolute()


def test_a_dangling_link_is_replaced(prefix: Path) -> None:
    (prefix / "lib" / "libsndfile.so.1").symlink_to("of_another_environment.so")

    assert libsndfile.link_libsndfile() == str(prefix / "lib" / "libsndfile.so.1")


def test_what_is_found_is_left_alone(prefix: Path) -> None:
    libsndfile.link_libsndfile()
    (prefix / "lib" / "python3.x").rename(prefix / "lib" / "python3.y")
    link = prefix / "lib" / "libsndfile.so.1"
    link.unlink()
    shutil.copy(next(prefix.rglob("libsndfile_*.so")), link)

    assert libsndfile.link_libsndfile() == str(link)
    assert not link.is_symlink()


@pytest.mark.usefixtures("prefix")
def test_a_machine_without_a_bundled_library_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")

    with pytest.raises(OSError, match=r"no libsndfile for .* on pdp11\. Install"):
        libsndfile.link_libsndfile()


def test_module_does_not_import_what_needs_the_library() -> None:
    code = (
        "import sys, moxe_plugin.libsndfile\n"
        "assert not {'fairseq2', 'fairseq2n', 'torch', 'soundfile'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
