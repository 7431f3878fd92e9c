"""``python -m moxe_plugin.speed.history``: what each change did to a training step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.console import Console

from moxe_plugin.speed.arguments import add_output_options

_STEP: Final = Path(__file__).with_name("history_step.py")

_ARCH: Final = "340m"
_BATCH: Final = 4
_LENGTH: Final = 256

_KEPT: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}
"""What newer versions do themselves, so that the allocator is not what differs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time commits of this repository, each in a process of its own.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    try:
        repository = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel"))
        rows = [_time_commit(repository, commit, args) for commit in args.commits]
        _write(rows, args)
    except (ValueError, OSError) as ex:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {ex}", markup=False, highlight=False
        )

        return 2

    return 0


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.history",
        description="Time a training step of MoxE at Table 1 size, "
        f"{_BATCH} x {_LENGTH} in float32 on the CPU, in commits of this repository: "
        "forward and backward pass, with the packages that are installed now.",
    )
    add = parser.add_argument

    add("commits", nargs="+", metavar="COMMIT", help="from the oldest to the newest")
    add("--system-allocator", action="store_true", help="let glibc return memory")
    add("--repeats", type=int, default=3, metavar="N", help="timed calls (default: 3)")
    add("--threads", type=int, default=2, metavar="N", help="default: 2")
    add_output_options(parser, "history")

    return parser


def _time_commit(repository: Path, commit: str, args: Namespace) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": ""}
    if not args.system_allocator:
        env |= _KEPT

    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit)

        try:
            sizes = (_BATCH, _LENGTH, 1, args.repeats, args.threads)
            completed = subprocess.run(
                [
                    *(sys.executable, "-c", _STEP.read_text("utf-8"), _ARCH),
                    *map(str, sizes),
                ],
                cwd=tree,
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            if completed.returncode != 0:
                last_line = completed.stderr.strip().splitlines()[-1:]
                raise ValueError(
                    f"`commits` must be versions that train '{_ARCH}', but '{commit}' "
                    f"does not: {''.join(last_line)}"
                )

            result = json.loads(completed.stdout.splitlines()[-1])
            if not Path(result["package"]).is_relative_to(tree):
                raise ValueError(
                    f"`{result['package']}` was timed in place of '{commit}': take it "
                    "out of the path of Python."
                )

            subject = _git(tree, "log", "-1", "--format=%s")
            short = _git(tree, "rev-parse", "--short=12", "HEAD")
        finally:
            _git(repository, "worktree", "remove", "--force", str(tree))

    seconds = statistics.median(result["seconds"])
    Console(soft_wrap=True).print(f"{short} {seconds:.2f} s  {subject}", markup=False)

    return {
        "commit": short,
        "subject": subject,
        "seconds_all": result["seconds"],
        "seconds": seconds,
        "tokens_per_s": _BATCH * _LENGTH / seconds,
    }


def _write(rows: Sequence[dict[str, Any]], args: Namespace) -> None:
    import torch

    from moxe_plugin.bench.machine import describe_hardware, list_versions
    from moxe_plugin.report.files import write_json

    machine = {
        **vars(describe_hardware("cpu", None, args.threads, 1)),
        "versions": list_versions(),
        "freed_memory": "returned" if args.system_allocator else "kept",
    }
    setting = {"arch": _ARCH, "batch": _BATCH, "length": _LENGTH, "dtype": "float32"}

    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / f"{args.name}.json",
        {"machine": machine, "setting": setting, "rows": list(rows)},
    )

    table = pd.DataFrame(
        {
            "commit": row["commit"],
            "change": row["subject"],
            "s": f"{row['seconds']:.2f}",
            "range": f"{min(row['seconds_all']):.2f} to {max(row['seconds_all']):.2f}",
            "tokens/s": f"{row['tokens_per_s']:.1f}",
            "than the row before": f"{before['seconds'] / row['seconds']:.2f}",
            "than the first": f"{rows[0]['seconds'] / row['seconds']:.2f}",
        }
        for before, row in zip([rows[0], *rows], rows, strict=False)
    )
    page = (
        f"# A training step of MoxE, commit by commit: {args.name}\n\n"
        f"Written by `python -m moxe_plugin.speed.history` from `{args.name}.json`. "
        f"{_ARCH}, {_BATCH} x {_LENGTH},\nfloat32, forward and backward pass, "
        f"{machine['model']}, {args.threads} threads, torch {torch.__version__}; freed "
        f"memory was\n{machine['freed_memory']}. The last columns say how many times "
        "as fast.\n\n"
    )
    (args.out / f"{args.name}.md").write_text(
        f"{page}{table.to_markdown(index=False, disable_numparse=True)}\n", "utf-8"
    )


def _git(directory: Path, *args: str) -> str:
    try:
        completed = subprocess.run(
            ["git", "-C", str(directory), *args],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as ex:
        raise ValueError(
            f"`commits` must be of a git repository here, but `git {' '.join(args)}` "
            f"failed: {ex.stderr.strip()}"
        ) from ex

    return completed.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
