"""The ``moxe doctor`` command."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from moxe_plugin.doctor.checks import Check, run_checks


def main(argv: list[str] | None = None) -> int:
    """Examine the installation and print what was found.

    :param argv: The arguments; those of the process by default.

    :returns: 0 if every check passed, otherwise 1.
    """
    args = _create_parser().parse_args(argv)

    checks: Iterable[Check] = run_checks(fix=args.fix)

    if args.json:
        checks = list(checks)
        passed = all(c.passed for c in checks)
        report = {"passed": passed, "checks": [asdict(c) for c in checks]}
        Console(soft_wrap=True).print_json(json.dumps(report))
    else:
        # A list, so that no check is skipped after one that failed.
        passed = all([c.passed for c in _print_each(checks)])

    return 0 if passed else 1


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe doctor",
        description="Check versions, libsndfile, what is registered with fairseq2 and "
        "lm-evaluation-harness, the files of this package, the cache, the device and "
        "the C++ for CPUs, which is compiled. "
        "Exits with 1 if a check fails.",
    )

    parser.add_argument(
        "--fix",
        action="store_true",
        help="link the libsndfile of the `soundfile` package if there is no other",
    )

    parser.add_argument("--json", action="store_true", help="print one JSON object")

    return parser


def _mark(check: Check) -> str:
    if not check.passed:
        return "[red]FAIL[/]"

    return "[yellow]warn[/]" if check.warns else "[green]ok  [/]"


def _print_each(checks: Iterable[Check]) -> Iterator[Check]:
    console = Console(soft_wrap=True, highlight=False)

    with console.status("Examining the installation ..."):
        for check in checks:
            console.print(f"{_mark(check)} {check.name:<13} {escape(check.finding)}")
            if not check.passed:
                console.print(f"     {'':<13} -> {escape(check.remedy)}")
            yield check
