"""``moxe report``: write the HTML report of recorded runs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT_RESULTS_DIR = Path("results")


def main(argv: list[str] | None = None) -> int:
    """Write the report.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    from rich.console import Console

    error_console = Console(stderr=True, soft_wrap=True)

    try:
        return _write_report(args, error_console)
    except (ValueError, OSError) as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 2


def _write_report(args: Namespace, error_console: Console) -> int:
    results_dir: Path = args.results
    output: Path = args.output or results_dir / "report.html"

    if not results_dir.is_dir():
        raise ValueError(f"`{results_dir}` is no directory; see --results.")

    if output.is_dir():
        raise ValueError(f"`--output` must be a file, but `{output}` is a directory.")

    # pandas and matplotlib take a second to import; `--help` must not.
    from moxe_plugin.data.overlap_file import OVERLAP_FILE, read_overlap
    from moxe_plugin.report.files import write_text
    from moxe_plugin.report.records import DamagedRun
    from moxe_plugin.report.run_dirs import find_run_dirs, read_runs
    from moxe_plugin.report.tables import read_report
    from moxe_plugin.report.terminal import create_console, print_excluded
    from moxe_plugin.report_page.page import render_page

    records, damaged = read_runs(find_run_dirs(results_dir))

    if not records:
        print_excluded(damaged, error_console)

        raise ValueError("there is no readable run; see --results.")

    overlap = None
    overlap_file = results_dir / OVERLAP_FILE

    if overlap_file.exists():
        try:
            overlap = read_overlap(overlap_file)
        except ValueError as ex:
            damaged.append(DamagedRun(name=overlap_file.name, reason=str(ex)))

    html = render_page(
        read_report(records, damaged, results_dir / "tables"), overlap=overlap
    )

    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, html)

    console = create_console()
    print_excluded(damaged, console)
    console.print(
        f"Written: {output} ({len(html.encode()) / 1e6:.1f} MB, {len(records)} runs)",
        markup=False,
        highlight=False,
    )

    return 0


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe report",
        description="Write one HTML page of all recorded runs that needs nothing else: "
        "who is best on what, by how much, how sure, at which cost, and what the paper "
        "says. Nothing is trained or evaluated; the same records give the same page, "
        "byte for byte.",
    )

    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=_DEFAULT_RESULTS_DIR,
        help="directory of runs (default: %(default)s)",
    )

    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where the page goes (default: report.html in --results)",
    )

    return parser


if __name__ == "__main__":
    sys.exit(main())
