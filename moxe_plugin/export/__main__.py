"""``moxe export``: write a trained model for transformers."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Final

from moxe_plugin.console import Stages, add_json_option, print_json
from moxe_plugin.models.checkpoint_files import DamagedCheckpointError

_DEFAULT_LICENSE: Final = "apache-2.0"


def main(argv: list[str] | None = None) -> int:
    """Export a checkpoint.

    :param argv: The arguments; those of the process by default.

    :returns: 0; 2 for a mistake of the user; 1 for a damaged checkpoint, a full disk or
        whatever else cannot be read or written.
    """
    args = _create_parser().parse_args(argv)

    from rich.console import Console

    console = Console(soft_wrap=True)
    error_console = Console(stderr=True, soft_wrap=True)

    try:
        _export(args)
    except (ValueError, OSError) as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 1 if isinstance(ex, (DamagedCheckpointError, OSError)) else 2

    if args.json:
        files = sorted(file.name for file in args.out.iterdir())

        print_json({"checkpoint": args.checkpoint, "out": args.out, "files": files})
    else:
        console.print(f"Written: {args.out}", markup=False, highlight=False)

    return 0


def _export(args: Namespace) -> None:
    # torch and fairseq2 take seconds to import; `--help` must not.
    from moxe_plugin.export.exporting import NUM_PARTS, export_checkpoint

    with Stages() as stages, stages.start("Exporting", NUM_PARTS) as stage:
        export_checkpoint(
            args.checkpoint,
            args.out,
            step=args.step,
            tokenizer=args.tokenizer,
            run_dir=args.record,
            license_id=args.license,
            on_part=stage.advance,
        )


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe export",
        description="Write a trained model for transformers: safetensors, config.json, "
        "generation_config.json, the tokenizer, the recipe of its training and a model "
        "card. Where a checkpoint is asked for, the folder is one too.",
    )

    add = parser.add_argument

    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="output directory of a training, or asset name",
    )
    add("out", metavar="OUT", type=Path, help="the folder to write; must not exist yet")
    add("--step", metavar="N", type=int, help="checkpoint's step (default: the last)")
    add(
        "--tokenizer",
        metavar="DIR",
        help="asset name or directory of the tokenizer, if it is no longer where the "
        "training had it",
    )
    add(
        "--record",
        metavar="RUN",
        type=Path,
        help="directory of the run in results/, whose scores and versions go into the "
        "model card",
    )
    add(
        "--license",
        metavar="ID",
        default=_DEFAULT_LICENSE,
        help="licence of the weights, as Hugging Face calls it (default: %(default)s)",
    )
    add_json_option(parser)

    return parser


if __name__ == "__main__":
    sys.exit(main())
