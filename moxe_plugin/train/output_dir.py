"""What a command may do to an output directory that holds something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_SIGNS_OF_A_RUN: Final = (
    "logs/rank_*.log",
    "checkpoints/model.yaml",
    "config.yaml",
    # With a sweep directory of fairseq2.
    "*/logs/rank_*.log",
)

_PROGRESS: Final = ("metrics/**/*.jsonl", "checkpoints/step_*", "output/*")
"""What changes once a run has done something."""


class OutputDirError(ValueError):
    """An output directory must not be written to."""


def check_output_dir(output_dir: Path) -> None:
    """Make sure that a run can go into a directory, and overwrites nothing of others.

    :param output_dir: The directory; it need not exist.

    :raises OutputDirError: It is a file or below one, or holds something that is no
        run of a recipe.
    """
    for path in (output_dir, *output_dir.parents):
        if path.is_dir():
            break

        if path.exists():
            raise OutputDirError(
                f"`OUTPUT_DIR` must be a directory, but is '{output_dir}', and "
                f"'{path}' is a file. Choose another one."
            )

    if not output_dir.is_dir():
        return

    found = sorted(path.name for path in output_dir.iterdir())

    if found and not any(any(output_dir.glob(s)) for s in _SIGNS_OF_A_RUN):
        raise OutputDirError(
            "`OUTPUT_DIR` must be new, empty or that of an earlier run, but is "
            f"'{output_dir}', which holds '{found[0]}' and is no run. Choose another "
            "one."
        )


@contextmanager
def keep_config(output_dir: Path) -> Iterator[None]:
    """Bring back ``config.yaml`` if a command fails before it has done anything.

    fairseq2 writes it first and checks afterwards: a mistake in a command would leave
    a finished run with a configuration that is not its own.

    :param output_dir: The output directory; it need not exist.

    :yields: Nothing.
    """
    file = output_dir / "config.yaml"

    old = file.read_bytes() if file.is_file() else None

    progress = _list_progress(output_dir)

    try:
        yield
    except BaseException:
        is_first = os.environ.get("RANK", "0") == "0"

        if is_first and old is not None and progress == _list_progress(output_dir):
            file.write_bytes(old)

        raise


def _list_progress(output_dir: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(path), path.stat().st_size)
        for pattern in _PROGRESS
        for path in output_dir.glob(pattern)
    )
