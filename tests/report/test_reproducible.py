"""`moxe tables` gives the same bytes wherever and whenever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moxe_plugin.report.run_dirs import find_run_dirs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def _copy_results(directory: Path) -> None:
    """Link the runs in another order; what `moxe tables` writes stays away."""
    (directory / "tables").mkdir(parents=True)

    for run_dir in reversed(find_run_dirs(RESULTS)):
        (directory / run_dir.name).symlink_to(run_dir)

    for file in (RESULTS / "paper.json", *RESULTS.glob("tables/systems_*")):
        (directory / file.relative_to(RESULTS)).write_bytes(file.read_bytes())


@pytest.mark.skipif(not RESULTS.is_dir(), reason="a wheel has no results")
def test_committed_files_are_reproduced_byte_for_byte(tmp_path: Path) -> None:
    _copy_results(tmp_path / "results")

    # A language that writes numbers with commas, another hash seed and time zone, and
    # settings of matplotlib that would change each figure.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    environment = {
        **os.environ,
        "LC_ALL": "de_DE.UTF-8",
        "PYTHONHASHSEED": "4711",
        "TZ": "Asia/Tokyo",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "OPENBLAS_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, "-m", "moxe_plugin.report"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )

    written, committed = (
        {file.name: file.read_bytes() for file in (d / "tables").iterdir()}
        for d in (tmp_path / "results", RESULTS)
    )

    assert sorted(written) == sorted(committed)
    assert [name for name in written if written[name] != committed[name]] == []
