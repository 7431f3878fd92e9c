"""``moxe systems``: what every system of the paper costs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from moxe_plugin.console import Stages, add_json_option, print_json

_DEFAULT_OUT = Path("results") / "tables"


def main(argv: list[str] | None = None) -> int:
    """Measure the systems of a size and write their table.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    # torch and fairseq2 take seconds to import; `--help` must not.
    from rich.console import Console

    from moxe_plugin.systems.catalogue import list_systems
    from moxe_plugin.systems.measuring import measure_system
    from moxe_plugin.systems.table import systems_frame, write_systems_table

    console, error_console = Console(soft_wrap=True), Console(stderr=True)

    try:
        systems = list_systems(args.size)

        # Measuring takes minutes; a place that cannot be written to must not cost them.
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 2

    costs = []

    with Stages() as stages, stages.start("Measuring", total=len(systems)) as stage:
        for system in stage.over(systems):
            cost = measure_system(system, args.context_len)
            costs.append(cost)

            stages.show(
                f"{system.family} {system.arch}: {cost.num_parameters:,} parameters, "
                f"{cost.num_active_parameters:,} active, "
                f"{cost.num_effective_parameters:,} effective, "
                f"{cost.flops_per_token / 1e6:,.1f} MFLOP per token"
            )

    files = write_systems_table(
        costs, size=args.size, context_len=args.context_len, tables_dir=args.out
    )

    if args.json:
        rows = systems_frame(costs, args.context_len)

        print_json(
            {
                "size": args.size,
                "systems": rows.astype(object)
                .where(rows.notna(), None)
                .to_dict("records"),
                "files": files,
            }
        )

        return 0

    names = ", ".join(file.name for file in files)
    console.print(f"Written: {names} in {args.out}", highlight=False)

    return 0


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe systems",
        description="Write the table of all systems of the paper: total, active and "
        "effective parameters, and FLOPs per token. Effective parameters are measured "
        "on the CPU; 340m takes 8 GB of memory and some minutes for each system.",
    )

    parser.add_argument(
        "--size",
        metavar="SIZE",
        default="quickstart",
        help="340m (the paper's Table 1), small, quickstart or tiny "
        "(default: %(default)s)",
    )

    parser.add_argument(
        "--context-len",
        metavar="N",
        type=_positive,
        default=256,
        help="tokens of context for the FLOPs (default: %(default)s)",
    )

    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=_DEFAULT_OUT,
        help="where systems_SIZE.md and .csv go (default: %(default)s)",
    )

    add_json_option(parser)

    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be an integer of at least 1, but is '{text}'")

    return int(text)


if __name__ == "__main__":
    sys.exit(main())
