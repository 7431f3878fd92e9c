"""``moxe tables``: regenerate tables and plots from recorded runs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moxe_plugin.console import add_json_option, print_json

if TYPE_CHECKING:
    from moxe_plugin.report.comparison import SuiteResults

DEFAULT_RESULTS_DIR = Path("results")


def main(argv: list[str] | None = None) -> int:
    """Write tables for recorded runs.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 if there is no readable run.
    """
    args = _create_parser().parse_args(argv)

    # pandas and matplotlib take a second to import; `--help` must not.
    from rich.console import Console

    from moxe_plugin.report.run_dirs import find_run_dirs, read_runs
    from moxe_plugin.report.tables import write_tables
    from moxe_plugin.report.terminal import (
        create_console,
        print_excluded,
        print_results,
    )

    console, error_console = create_console(), Console(stderr=True, soft_wrap=True)

    results_dir: Path = args.results

    if not args.runs and not results_dir.is_dir():
        error_console.print(f"error: `{results_dir}` is no directory; see --results.")

        return 2

    records, damaged = read_runs(args.runs or find_run_dirs(results_dir))

    if not records:
        print_excluded(damaged, error_console)
        error_console.print("error: there is no readable run; see --results.")

        return 2

    tables_dir = results_dir / "tables"

    results = write_tables(records, damaged, tables_dir)

    if args.json:
        print_json(_to_document(results, tables_dir))
    else:
        print_results(results, tables_dir, console)

    return 0


def _to_document(results: Sequence[SuiteResults], tables_dir: Path) -> dict[str, Any]:
    from moxe_plugin.report.files import read_json

    suites = [read_json(tables_dir / f"{suite.suite}.json") for suite in results]

    return {"tables_dir": tables_dir, "suites": suites}


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe tables",
        description="Write tables and plots from recorded runs. Nothing is trained or "
        "evaluated; the same records give the same files, byte for byte.",
    )

    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        type=Path,
        help="run directories (default: all of --results)",
    )

    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=DEFAULT_RESULTS_DIR,
        help="directory of runs; tables go to DIR/tables (default: %(default)s)",
    )

    add_json_option(parser)

    return parser


if __name__ == "__main__":
    sys.exit(main())
