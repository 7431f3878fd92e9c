"""``moxe bench``: run a suite and print its table."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from moxe_plugin.bench.children import ChildFunction
    from moxe_plugin.bench.runner import FailedRun
    from moxe_plugin.bench.work_dir import Conflict


def main(argv: list[str] | None = None) -> int:
    """Run a suite.

    :param argv: The arguments; those of the process by default.

    :returns: 0 if every run is recorded, 1 if one failed, 2 for a mistake of the user,
        130 if interrupted.
    """
    args = _create_parser().parse_args(argv)

    from rich.console import Console

    from moxe_plugin.bench.children import ChildFailedError
    from moxe_plugin.bench.suite import SuiteError
    from moxe_plugin.report.terminal import create_console

    error_console = Console(stderr=True, soft_wrap=True)

    try:
        return _run(args, create_console())
    except SuiteError as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 2
    except ChildFailedError as ex:
        _print_failure(error_console, "The preparation failed.", ex)

        return 1
    except KeyboardInterrupt:
        error_console.print("Interrupted. Run the same command again to continue.")

        return 130


def _run(args: Namespace, console: Console) -> int:
    from moxe_plugin.bench.children import create_context
    from moxe_plugin.bench.display import open_display
    from moxe_plugin.bench.dry_run import print_plan
    from moxe_plugin.bench.estimate import list_steps
    from moxe_plugin.bench.machine import plan_jobs
    from moxe_plugin.bench.plan import Resolution, plan_suite
    from moxe_plugin.bench.runner import Runner, run_with_progress
    from moxe_plugin.bench.stages import (
        PRELOAD,
        STAGE_FUNCTIONS,
        build_data,
        measure_steps,
        resolve_suite,
    )
    from moxe_plugin.bench.suite import (
        SuiteError,
        add_options,
        load_suite,
        replace_text,
        select,
    )
    from moxe_plugin.bench.work_dir import (
        find_conflicts,
        lock_work_dir,
        remove_conflicts,
    )

    suite = select(load_suite(args.suite), args.only, args.seeds)
    suite = replace_text(suite, args.text, args.valid_text)

    results_dir: Path = args.out or Path("outputs") / suite.name
    work_dir: Path = (args.work or results_dir / "work").absolute()

    jobs = plan_jobs(args.jobs)

    context = create_context(PRELOAD)

    with lock_work_dir(work_dir), open_display(console) as display:

        def prepare(title: str, function: ChildFunction, *args: object) -> Any:
            content = run_with_progress(
                context,
                function,
                args,
                title=title,
                log_file=work_dir / "prepare.log",
                display=display,
                num_threads=jobs.num_threads,
            ).content

            if "error" in content:
                raise SuiteError(content["error"])

            return content

        if suite.corpus is not None or suite.instructions is not None:
            options = prepare("Building the data", build_data, suite, work_dir)
            suite = add_options(suite, **options)

        resolution = prepare("Reading presets, preparing data", resolve_suite, suite)

        plans = plan_suite(suite, Resolution(**resolution), work_dir)

        conflicts = find_conflicts(plans, results_dir)

        if args.dry_run:
            steps = list_steps(plans)
            costs = prepare("Timing a step of each model", measure_steps, steps)
            print_plan(console, plans, results_dir, costs, jobs)

            return 0

        if conflicts and not args.redo:
            raise SuiteError(_describe_conflicts(conflicts))

        remove_conflicts(conflicts)

        display.expect(plans)

        runner = Runner(
            suite.name,
            results_dir,
            context=context,
            functions=STAGE_FUNCTIONS,
            display=display,
            jobs=jobs,
        )

        failed = runner.run(plans)

    return _report(console, results_dir, failed)


def _report(console: Console, results_dir: Path, failed: list[FailedRun]) -> int:
    from moxe_plugin.report.run_dirs import find_run_dirs, read_runs
    from moxe_plugin.report.tables import write_tables
    from moxe_plugin.report.terminal import print_results

    if results_dir.is_dir():
        tables_dir = results_dir / "tables"

        records, damaged = read_runs(find_run_dirs(results_dir))
        results = write_tables(records, damaged, tables_dir)

        print_results(results, tables_dir, console)

        console.print(f"Records: {results_dir}/<run>", highlight=False)

    for plan, stage, error in failed:
        _print_failure(console, f"{plan.title}: {stage.name} failed.", error)

    return 1 if failed else 0


def _print_failure(console: Console, title: str, error: object) -> None:
    from moxe_plugin.bench.children import ChildFailedError

    assert isinstance(error, ChildFailedError)

    console.print(error.read_log_tail(), markup=False, highlight=False)
    console.print(f"error: {title} {error}", markup=False, highlight=False)


def _describe_conflicts(conflicts: list[Conflict]) -> str:
    lines = ["These stages were begun with another configuration:"]

    for stage, changes in conflicts:
        lines.append(f"  {stage.state_file.with_suffix('')}")
        lines += [f"    {change}" for change in changes[:8]]

        if not changes:
            lines.append("    (the data, or an earlier stage)")

    lines.append(
        "Remove and repeat them with --redo, or keep them: choose other --out."
    )

    return "\n".join(lines)


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be greater than or equal to 1, but is {number}")

    return number


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe bench",
        description="Train, finetune and evaluate the systems of a suite, and print "
        "their table. What is done already is not done again, so a killed command "
        "continues when it is repeated.",
    )

    parser.add_argument(
        "suite", metavar="SUITE", help="name of a suite, or a YAML file of your own"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where records and tables go (default: outputs/SUITE)",
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="where checkpoints and logs go (default: OUT/work)",
    )
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", help="run these systems only"
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        nargs="+",
        type=int,
        help="run these seeds instead of the suite's",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        help="train on this text instead of the suite's: .txt, .jsonl or .parquet",
    )
    parser.add_argument(
        "--valid-text",
        metavar="FILE",
        nargs="+",
        help="hold this text out (default: 2 %% of the documents of --text)",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_positive_int,
        help="how many runs at a time (default: one per GPU; one per core where there "
        "is none)",
    )
    parser.add_argument(
        "--redo",
        action="store_true",
        help="repeat what was begun with another configuration",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and exit"
    )

    return parser


if __name__ == "__main__":
    sys.exit(main())
