"""The commands `fairseq2` and `moxe`; nothing heavy is imported to answer ``-h``."""

from __future__ import annotations

import json
import runpy
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from moxe_plugin.train.registry import RecipeEntry

    _SubParsers = _SubParsersAction[ArgumentParser]

_GROUPS: Final = {"lm": "language models"}

_MOXE_COMMANDS: Final = {
    "data": ("moxe_plugin.data.__main__", "build and inspect token shards"),
    "bench": ("moxe_plugin.bench.__main__", "run a suite: train, finetune, evaluate"),
    "tables": ("moxe_plugin.report.__main__", "write the tables of recorded runs"),
    "doctor": ("moxe_plugin.doctor", "check the installation"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `fairseq2` command: 0.4's interface on 0.8's recipe engine.

    :param argv: The arguments; those of the process by default.

    :returns: The exit code; errors of a recipe exit by themselves.
    """
    parser = ArgumentParser(
        prog="fairseq2", description="Train and use models.", allow_abbrev=False
    )

    groups = parser.add_subparsers(dest="group", metavar="GROUP", required=True)

    _add_recipes(groups)
    _add_assets(groups)

    args = parser.parse_args(argv)

    if args.group == "assets":
        return _run_assets(args)

    return _run_recipe(args)


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

    for name, (_, summary) in _MOXE_COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)

    # The module parses what follows its name, `-h` included.
    args = parser.parse_args(argv[:1])

    module, _ = _MOXE_COMMANDS[args.command]

    return int(import_module(module).main(argv[1:]))


def _add_recipes(groups: _SubParsers) -> None:
    from moxe_plugin.train.registry import list_recipes

    commands: dict[str, _SubParsers] = {}

    for entry in list_recipes():
        group, _, command = entry.name.partition("/")

        if group not in commands:
            summary = _GROUPS.get(group, "recipes of another package")

            group_parser = groups.add_parser(
                group, help=summary, description=summary.capitalize() + "."
            )

            commands[group] = group_parser.add_subparsers(
                dest="command", metavar="COMMAND", required=True
            )

        parser = commands[group].add_parser(
            command,
            help=entry.summary,
            description=entry.summary.capitalize() + ".",
            allow_abbrev=False,
        )

        _add_recipe_options(parser, entry)


def _add_recipe_options(parser: ArgumentParser, entry: RecipeEntry) -> None:
    parser.set_defaults(entry=entry, parser=parser)

    add = parser.add_argument

    add("output_dir", nargs="?", metavar="OUTPUT_DIR", help="where everything goes")

    for shortcut in entry.shortcuts:
        add(
            shortcut.option,
            dest=shortcut.key,
            action="append" if shortcut.repeatable else "store",
            type=shortcut.kind,
            metavar="N" if shortcut.kind is int else shortcut.option[2:].upper(),
            help=f"{shortcut.help}; sets `{shortcut.key}`",
        )

    add(
        "--preset",
        metavar="NAME",
        help="preset to start from"
        + (f" (default: {entry.default_preset})" if entry.default_preset else ""),
    )
    add(
        "--list-presets",
        "--list-preset-configs",
        action="store_true",
        help="list the presets and exit",
    )
    add(
        "--config-file",
        nargs="+",
        action="extend",
        metavar="FILE",
        default=[],
        help="YAML files merged into the preset, from left to right",
    )
    add(
        "--config",
        nargs="*",
        action="append",
        metavar="KEY=VALUE",
        default=[],
        help="single values, `del:KEY` to delete one; they go last",
    )
    add("--dump-config", action="store_true", help="print the configuration and exit")
    add(
        "--no-sweep-dir",
        action="store_true",
        help="use OUTPUT_DIR as it is; moxe_plugin's own recipes do so anyway",
    )
    add(
        "--sweep-format",
        metavar="FORMAT",
        help="use a sub-directory of this name, e.g. '{preset}.ws_{world_size}.{hash}'",
    )
    add("--cluster", metavar="NAME", help="the cluster on which to run")
    add("--debug", action=BooleanOptionalAction, help="log debug messages")
    add("--checkpoint-dir", metavar="DIR", help="where checkpoints go instead")
    add("--no-rich", action="store_true", help="plain logging, no progress bar")
    add("--no-exit-on-error", action="store_true", help="propagate errors")
    add("--quiet", action="store_true", help="show progress and warnings only")


def _run_recipe(args: Namespace) -> int:
    from moxe_plugin.train.registry import UnknownNameError, find_preset, list_presets

    entry: RecipeEntry = args.entry

    if args.list_presets:
        for name in list_presets(entry.name):
            default = " (default)" if name == entry.default_preset else ""
            sys.stdout.write(f"{name}{default}\n")

        return 0

    _rescue_output_dir(args)

    if args.output_dir is None and not args.dump_config:
        args.parser.error("OUTPUT_DIR is required; put it before all options.")

    if args.output_dir is not None and Path(args.output_dir).is_file():
        args.parser.error(f"OUTPUT_DIR must be no file, but is {args.output_dir}.")

    preset: str | None = args.preset

    if preset is None and not args.config_file:
        preset = entry.default_preset

    files = [Path(f) for f in args.config_file]

    if preset is not None:
        try:
            files.insert(0, find_preset(entry.name, preset))
        except UnknownNameError as ex:
            _fail(args, ex)

    from moxe_plugin.train.launch import ConfigFileError, compose_config, launch

    recipe = entry.load()

    try:
        config = compose_config(recipe.config_kls, files)
    except ConfigFileError as ex:
        _fail(args, ex)

    launch(recipe, config, _to_fairseq2_args(args, preset), quiet=args.quiet)

    return 0


def _rescue_output_dir(args: Namespace) -> None:
    # `--config` takes all that follows, so `--config a=1 OUT` would lose OUT.
    if args.output_dir is None and args.config and args.config[-1]:
        last = args.config[-1][-1]

        if "=" not in last and not last.startswith("del:"):
            args.output_dir = args.config[-1].pop()


def _to_fairseq2_args(args: Namespace, preset: str | None) -> list[str]:
    output = [] if args.output_dir is None else [args.output_dir]

    for option in ("dump_config", "no_rich", "no_exit_on_error"):
        if getattr(args, option):
            output.append("--" + option.replace("_", "-"))

    if args.checkpoint_dir is not None:
        output += ["--checkpoint-dir", args.checkpoint_dir]

    for items in args.config:
        # 0.4's `add:` and `set:` are one in 0.8.
        items = [i.replace("add:", "set:", 1) if i[:4] == "add:" else i for i in items]

        output += ["--config", *items]

    values = _option_values(args, preset)

    if values:
        # JSON is YAML.
        output += ["--config", *(f"{k}={json.dumps(v)}" for k, v in values.items())]

    return output


def _option_values(args: Namespace, preset: str | None) -> dict[str, object]:
    values: dict[str, object] = {
        s.key: getattr(args, s.key)
        for s in args.entry.shortcuts
        if getattr(args, s.key) is not None
    }

    if args.sweep_format is not None:
        values["common.no_sweep_dir"] = False
        values["common.sweep_format"] = args.sweep_format.replace(
            "{preset}", (preset or "none").replace("/", "_")
        )

    if args.no_sweep_dir:
        values["common.no_sweep_dir"] = True

    if args.cluster is not None:
        values["common.cluster"] = args.cluster

    if args.debug is not None:
        values["common.debug"] = args.debug

    return values


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


def _fail(args: Namespace, ex: ValueError) -> NoReturn:
    args.parser.exit(2, f"{args.parser.prog}: error: {ex}\n")

    raise AssertionError("`exit` does not return.")
