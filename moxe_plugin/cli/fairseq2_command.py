"""The `fairseq2` command: 0.4's interface on 0.8's recipe engine."""

from __future__ import annotations

import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moxe_plugin.cli.recipes import add_recipes, run_recipe_command

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    _SubParsers = _SubParsersAction[ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairseq2` command.

    :param argv: The arguments; those of the process by default.

    :returns: The exit code; errors of a recipe exit by themselves.
    """
    parser = ArgumentParser(
        prog="fairseq2", description="Train and use models.", allow_abbrev=False
    )

    groups = parser.add_subparsers(dest="group", metavar="GROUP", required=True)

    add_recipes(groups)
    _add_assets(groups)

    args = parser.parse_args(argv)

    if args.group == "assets":
        return _run_assets(args)

    return run_recipe_command(args)


def _add_assets(groups: _SubParsers) -> None:
    parser = groups.add_parser(
        "assets", help="models, datasets and tokenizers", description="Known assets."
    )

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    list_parser = commands.add_parser("list", help="list the assets")
    list_parser.add_argument(
        "--type",
        "--kind",
        dest="kind",
        choices=("all", "model", "dataset", "tokenizer"),
        default="all",
        help="which assets (default: all)",
    )

    show_parser = commands.add_parser("show", help="show an asset")
    show_parser.add_argument("name", metavar="NAME", help="the name of the asset")


def _run_assets(args: Namespace) -> int:
    options = ["--kind", args.kind] if args.command == "list" else [args.name]

    original = sys.argv

    sys.argv = ["fairseq2 assets", args.command, *options]

    try:
        runpy.run_module("fairseq2.assets", run_name="__main__")
    finally:
        sys.argv = original

    return 0
