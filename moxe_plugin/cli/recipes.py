"""The commands that run recipes: their options, and what fairseq2 makes of them."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from moxe_plugin.train.registry import RecipeEntry

    _SubParsers = _SubParsersAction[ArgumentParser]

_GROUPS: Final = {"lm": "language models"}


def add_recipes(groups: _SubParsers) -> None:
    """Add a command for every recipe, ours and those of other packages.

    :param groups: Where the groups of commands go.
    """
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
        help_text = f"{shortcut.help}; sets `{shortcut.key}`"

        if shortcut.kind is bool:
            add(
                shortcut.option,
                dest=shortcut.key,
                action=BooleanOptionalAction,
                help=help_text,
            )
            continue

        add(
            shortcut.option,
            dest=shortcut.key,
            action="append" if shortcut.repeatable else "store",
            type=shortcut.kind,
            metavar="N" if shortcut.kind is int else shortcut.option[2:].upper(),
            help=help_text,
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


def run_recipe_command(args: Namespace) -> int:
    """Run a recipe as its command line says.

    :param args: What a parser of :func:`add_recipes` has parsed.

    :returns: The exit code; errors of a recipe exit by themselves.
    """
    from moxe_plugin.train.output_dir import OutputDirError, check_output_dir
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

    try:
        if args.output_dir is not None and not args.dump_config:
            check_output_dir(Path(args.output_dir))
    except OutputDirError as ex:
        _fail(args, ex)

    preset: str | None = args.preset

    if preset is None and not args.config_file:
        preset = entry.default_preset

    files = [Path(f) for f in args.config_file]

    if preset is not None:
        try:
            files.insert(0, find_preset(entry.name, preset))
        except UnknownNameError as ex:
            _fail(args, ex)

    from moxe_plugin.train.launch import (
        ConfigFileError,
        check_overrides,
        compose_config,
        launch,
    )

    recipe = entry.load()

    try:
        check_overrides([item for items in args.config for item in items])

        config = compose_config(recipe.config_kls, files)
    except ConfigFileError as ex:
        _fail(args, ex)

    quiet = args.quiet or entry.is_quiet

    launch(recipe, config, _to_fairseq2_args(args, preset), quiet=quiet)

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


def _fail(args: Namespace, ex: ValueError) -> NoReturn:
    args.parser.exit(2, f"{args.parser.prog}: error: {ex}\n")

    raise AssertionError("`exit` does not return.")
