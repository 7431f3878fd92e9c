"""The `moxe` command, which hands over to a module per sub-command."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import Final

_COMMANDS: Final = {
    "data": ("moxe_plugin.data.__main__", "build and inspect token shards"),
    "bench": ("moxe_plugin.bench.__main__", "run a suite: train, finetune, evaluate"),
    "systems": (
        "moxe_plugin.systems.__main__",
        "count the parameters and FLOPs of every system",
    ),
    "speed": (
        "moxe_plugin.speed.__main__",
        "time training, reading and continuing a text",
    ),
    "tables": ("moxe_plugin.report.__main__", "write the tables of recorded runs"),
    "report": (
        "moxe_plugin.report_page.__main__",
        "write the HTML report of recorded runs",
    ),
    "claims": ("moxe_plugin.claims.__main__", "judge the paper's claims"),
    "inspect": (
        "moxe_plugin.routing_page.__main__",
        "show where a model sends each token of a text",
    ),
    "export": ("moxe_plugin.export.__main__", "write a model for transformers"),
    "doctor": ("moxe_plugin.doctor", "check the installation"),
}


def moxe_main(argv: Sequence[str] | None = None) -> int:
    """Run the `moxe` command, which hands over to a module per sub-command.

    :param argv: The arguments; those of the process by default.

    :returns: The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)

    parser = ArgumentParser(
        prog="moxe", description="Data, suites, tables and checks of moxe_plugin."
    )

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, (_, summary) in _COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)

    # The module parses what follows its name, `-h` included.
    args = parser.parse_args(argv[:1])

    module, _ = _COMMANDS[args.command]

    return int(import_module(module).main(argv[1:]))
