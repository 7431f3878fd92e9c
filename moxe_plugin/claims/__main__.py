"""``moxe claims``: measure runs, judge the paper's claims, write the page."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moxe_plugin.console import Stages, add_json_option, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moxe_plugin.claims.judging import Judgement
    from moxe_plugin.models.train_output import TrainOutput

_NUM_ROUNDS: Final = 7


def main(argv: list[str] | None = None) -> int:
    """Measure runs and judge the claims.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    from rich.console import Console

    from moxe_plugin.report.terminal import create_console

    console, error_console = create_console(), Console(stderr=True, soft_wrap=True)

    try:
        if args.runs:
            _measure(args)
        elif args.time:
            raise ValueError("`--time` must come with the training outputs to time.")

        _judge(args, console)
    except (ValueError, OSError) as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 2

    return 0


def _measure(args: Namespace) -> None:
    if args.text is None:
        raise ValueError("`--text` must name the held-out text to measure runs on.")

    for file in (args.text, args.lambada):
        if file is not None and not file.is_file():
            raise ValueError(f"{file} does not exist.")

    # These take seconds to import, which a mistake above or `--help` must not cost.
    import torch
    from fairseq2.datasets import DatasetError
    from fairseq2.recipe.error import RecipeError
    from fairseq2.runtime.dependency import get_dependency_resolver

    from moxe_plugin.claims.measurements import write_measurement
    from moxe_plugin.claims.measuring import MeasureOptions, compute_key, measure_run
    from moxe_plugin.claims.run_search import find_runs, identify

    get_dependency_resolver()

    found = find_runs(args.runs)

    options = MeasureOptions(
        text=args.text,
        lambada=args.lambada,
        max_doc_tokens=args.max_doc_tokens,
        max_passages=args.max_passages,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs_dir = _runs_dir(args.out)

    total = len(found.finished)

    with Stages() as stages, stages.start("Measuring runs", total) as stage:
        for line in found.unfinished:
            stages.show(f"left out, not finished: {line}")

        for number, output in enumerate(stage.over(found.finished), start=1):
            system, seed = identify(output)
            prefix = f"[{number}/{total}] {system}, seed {seed}"

            if _is_measured(runs_dir, system, seed, compute_key(output, options)):
                stages.show(f"{prefix}: measured before")
                continue

            stages.show(f"{prefix}: measuring")
            try:
                measurement = measure_run(output, options, device, stages)
            except (DatasetError, RecipeError) as ex:
                raise ValueError(f"{output.dir}: {ex}") from ex

            write_measurement(runs_dir, measurement)

    if args.time:
        _time(args, found.finished, device.type)


def _is_measured(runs_dir: Path, system: str, seed: int, key: str) -> bool:
    from moxe_plugin.claims.measurements import read_measurement

    file = runs_dir / f"{system}_s{seed}.json"

    return file.exists() and read_measurement(file).key == key


def _time(args: Namespace, outputs: Sequence[TrainOutput], device_name: str) -> None:
    from moxe_plugin.claims.run_search import identify
    from moxe_plugin.claims.timing import (
        TIME_LENGTHS,
        TIMED_SYSTEMS,
        time_runs,
        write_times,
    )

    # Seeds differ in parameters, not in what is computed: the first one will do.
    by_system: dict[str, Path] = {}
    for output in sorted(outputs, key=lambda output: identify(output)[1]):
        by_system.setdefault(identify(output)[0], output.dir)

    runs = {
        system: by_system[system] for system in TIMED_SYSTEMS if system in by_system
    }

    # A thread that draws would take time from what is timed.
    with Stages(is_timing=True) as stages:
        times = time_runs(
            runs,
            args.text,
            lengths=TIME_LENGTHS,
            num_rounds=_NUM_ROUNDS,
            device_name=device_name,
            stages=stages,
        )
    write_times(args.out / "claims", times)


def _judge(args: Namespace, console: Console) -> None:
    from moxe_plugin.claims.catalogue import list_claims
    from moxe_plugin.claims.evidence import Evidence
    from moxe_plugin.claims.judging import judge
    from moxe_plugin.claims.measurements import read_measurements
    from moxe_plugin.claims.output import write_claims
    from moxe_plugin.claims.timing import read_times, time_exponents

    out: Path = args.out

    evidence = Evidence(read_measurements(_runs_dir(out)))
    times = read_times(out / "claims")

    exponents = None
    if times is not None and "moxe" in times["seconds"]:
        exponents = time_exponents(times["seconds"]["moxe"], times["lengths"])

    judgements = [judge(claim) for claim in list_claims(evidence, exponents)]

    files = write_claims(out, evidence, judgements, times)

    if args.json:
        claims = [_to_document(judgement) for judgement in judgements]

        print_json({"claims": claims, "out": out, "files": files})

        return

    _print_verdicts(judgements, console)
    console.print(f"Written: {', '.join(files)} in {out}", highlight=False)


def _to_document(judgement: Judgement) -> dict[str, Any]:
    answers = [
        {
            "question": answer.question.text,
            "unit": answer.question.unit,
            "direction": answer.question.direction,
            "bound": answer.question.bound,
            "estimate": None if answer.estimate is None else answer.estimate._asdict(),
            "missing": answer.missing,
            "p_value": answer.p_value,
            "verdict": answer.verdict,
        }
        for answer in judgement.answers
    ]

    return {
        "claim": judgement.claim.key,
        "title": judgement.claim.title,
        "verdict": judgement.verdict,
        "answers": answers,
    }


def _print_verdicts(judgements: Sequence[Judgement], console: Console) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=0, show_edge=False)
    for heading in ("claim", "verdict", "numbers"):
        table.add_column(heading)

    for judgement in judgements:
        decided = [answer.verdict for answer in judgement.answers]
        counts = ", ".join(
            f"{decided.count(verdict)} {verdict}" for verdict in dict.fromkeys(decided)
        )
        claim = judgement.claim
        table.add_row(f"({claim.key}) {claim.title}", judgement.verdict, counts)

    console.print(table)


def _runs_dir(out: Path) -> Path:
    return out / "claims" / "runs"


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe claims",
        description="Judge the paper's claims. Trained runs are measured on a held-out "
        "text, once; the page is written from what was measured, also without runs.",
    )

    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        type=Path,
        help="training outputs, or directories that hold some, such as the work "
        "directory of a suite (default: write the page from earlier measurements)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="held-out documents: .jsonl with `text`, .parquet or .txt",
    )
    parser.add_argument(
        "--lambada",
        metavar="FILE",
        type=Path,
        help="LAMBADA as .jsonl with `text` (default: not measured)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="writes DIR/claims.md and DIR/claims/ (default: %(default)s)",
    )
    parser.add_argument(
        "--max-doc-tokens",
        metavar="N",
        type=int,
        default=1536,
        help="tokens read of a document (default: %(default)s)",
    )
    parser.add_argument(
        "--max-passages",
        metavar="N",
        type=int,
        default=1000,
        help="LAMBADA passages, by order of a hash (default: %(default)s)",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="also time forward passes by length; nothing else may run meanwhile",
    )
    add_json_option(parser)

    return parser


if __name__ == "__main__":
    sys.exit(main())
