"""``moxe speed``: how fast systems train, read a text and continue it."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moxe_plugin.console import Stages, print_json
from moxe_plugin.speed.arguments import create_parser

if TYPE_CHECKING:
    from rich.console import Console

    from moxe_plugin.speed.options import MeasureOptions
    from moxe_plugin.speed.records import SpeedRow


def main(argv: list[str] | None = None) -> int:
    """Measure the cases of suites and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = create_parser().parse_args(argv)

    # torch and fairseq2 take seconds to import; `--help` must not.
    from rich.console import Console

    from moxe_plugin.nn.native.library import NativeLibraryError

    console, error_console = Console(soft_wrap=True), Console(stderr=True)

    try:
        _measure(args, console)
    except (ValueError, OSError, NativeLibraryError) as ex:
        error_console.print(
            f"error: {ex}", markup=False, highlight=False, soft_wrap=True
        )

        return 2

    return 0


def _measure(args: Namespace, console: Console) -> None:
    from moxe_plugin.allocator import keep_freed_memory
    from moxe_plugin.speed.measuring import describe_machine, measure_case
    from moxe_plugin.speed.records import pool_rows, write_speed_json
    from moxe_plugin.speed.suites import SuiteOptions, list_cases
    from moxe_plugin.speed.table import write_speed_table

    if args.name is not None and Path(args.name).name != args.name:
        raise ValueError(
            f"`name` must be the name of a file, but is '{args.name}' instead. "
            "Directories go to `--out`."
        )

    suite_options = SuiteOptions(
        size=args.size,
        batch=args.batch,
        length=args.length,
        experts=args.experts,
        tokens=args.tokens,
        swap_linear=args.swap_linear,
        nxai_xlstm=args.nxai_xlstm,
        capture_steps=args.capture_steps,
    )

    # A suite named twice is measured once.
    suites = dict.fromkeys(args.suite)
    cases = [case for suite in suites for case in list_cases(suite, suite_options)]

    options = _read_measure_options(args)

    not_kept = None
    if options.allocator == "kept" and options.device.type == "cpu":
        not_kept = keep_freed_memory()

    machine = describe_machine(options)

    name = args.name or f"{machine['name']}_{options.precision}"
    # Not `with_suffix`: a name may have a dot.
    json_file, page = (args.out / f"{name}.{suffix}" for suffix in ("json", "md"))

    # The measurements of each case.
    measured: list[list[SpeedRow]] = [[] for _ in cases]
    rows: list[SpeedRow] = []
    turns = [i for _ in range(args.rounds) for i in range(len(cases))]

    # A thread that draws would take time from what is timed.
    with (
        Stages(is_timing=True) as stages,
        stages.start("Measuring", total=len(turns)) as stage,
    ):
        if not_kept is not None:
            stages.show(f"`allocator` has no effect: {not_kept}.")

        for turn, i in enumerate(stage.over(turns), start=1):
            row = measure_case(cases[i], machine, options)
            measured[i].append(row)
            rows = [pool_rows(of_case) for of_case in measured if of_case]

            # A later case may need more memory than there is.
            write_speed_json(json_file, machine, rows)
            write_speed_table(page, machine, rows)

            stages.show(f"[{turn}/{len(turns)}] {_describe_row(row)}")

    if args.json:
        print_json(
            {
                "machine": machine,
                "rows": [asdict(row) for row in rows],
                "files": [json_file, page],
            }
        )
    else:
        console.print(f"Written: {name}.json, {name}.md in {args.out}", highlight=False)


def _describe_row(row: SpeedRow) -> str:
    from moxe_plugin.speed.remarks import list_changes

    speed = "out of memory"
    if row.tokens_per_s is not None:
        speed = f"{row.tokens_per_s:,.1f} tokens/s"

    changes = "".join(f" {key}={value}" for key, value in list_changes(row).items())

    return (
        f"{row.suite}: {row.family} {row.arch}{changes} {row.phase}"
        f"{' + AdamW' if row.optimizer else ''}, {row.batch} x {row.length}: {speed}"
    )


def _read_measure_options(args: Namespace) -> MeasureOptions:
    import torch

    from moxe_plugin.speed.nxai import check_nxai
    from moxe_plugin.speed.options import MeasureOptions
    from moxe_plugin.speed.swapping import check_swap

    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(
            f"`device` must be cpu or cuda, but is '{args.device}' instead."
        ) from None

    options = MeasureOptions(
        device=device,
        precision=args.dtype,
        repeats=args.repeats,
        warm_up=args.warm_up,
        decode_tokens=args.decode_tokens,
        chunk_len=args.chunk,
        matmul_size=args.matmul_size or (8192 if device.type == "cuda" else 2048),
        copy_bytes=args.copy_mib * 2**20,
        seed=args.seed,
        allocator=args.allocator,
        checkpoint_layers=args.checkpoint_layers,
        router_skew=args.router_skew,
    )
    options.check()

    if args.swap_linear:
        check_swap(device, options.precision)
    if args.nxai_xlstm:
        check_nxai(device)
    if args.capture_steps and device.type != "cuda":
        raise ValueError(
            "`capture_steps` needs `device` cuda, which launches graphs, but it is "
            f"'{device}' instead."
        )

    if args.threads is not None:
        num_cores = len(os.sched_getaffinity(0))
        if args.threads > num_cores:
            raise ValueError(
                f"`threads` must be at most the number of cores ({num_cores}), but is "
                f"{args.threads} instead."
            )

        torch.set_num_threads(args.threads)

    return options


if __name__ == "__main__":
    sys.exit(main())
