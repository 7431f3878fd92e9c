"""Checks commands that a test cannot run: their options, and the names they give."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any, Final

CHECK_ONLY_VARIABLE: Final = "MOXE_DOCS_CHECK_ONLY"
CHECKED_FILE_VARIABLE: Final = "MOXE_DOCS_CHECKED_FILE"

PROGRAMS: Final = ("fairseq2", "moxe", "lm_eval", "torchrun", "python", "tox")

_TOX_INI: Final = Path(__file__).resolve().parents[2] / "tox.ini"


class _ParsedError(Exception):
    """Ends a command where its options have been parsed."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)

        self.namespace = args


def check_command(program: str, args: list[str]) -> int:
    """Check a command without running it, and note that it was.

    :param program: The program.
    :param args: Its arguments.

    :returns: 0; a wrong option exits as the command would.

    :raises ValueError: A preset, a suite, a task or a module is not known.
    """
    match program, args:
        case "fairseq2", _:
            _check_recipe(args)
        case "moxe", [command, *_]:
            _check_moxe(command, args)
        case "lm_eval", _:
            _check_harness(args)
        case "torchrun", _:
            _check_torchrun(args)
        case "tox", _:
            _check_tox(args)
        case "python", ["-m", module, *rest]:
            _check_module(module, rest)
        case _:
            raise ValueError(f"`{program} {args}` cannot be checked.")

    with Path(os.environ[CHECKED_FILE_VARIABLE]).open("a") as file:
        file.write(f"{program} {' '.join(args)}\n")

    return 0


def _check_module(module: str, args: list[str]) -> None:
    match module:
        case "moxe_plugin":
            _check_recipe(args)
        case "moxe_plugin.eval":
            if args != ["--print-task-path"]:
                _check_harness(args)
        case (
            "moxe_plugin.speed.contexts"
            | "moxe_plugin.speed.history"
            | "moxe_plugin.speed.kernels"
            | "moxe_plugin.speed.profile"
        ):
            command = import_module(module)

            _parse(lambda: command.main(args), skip=0)
        case _:
            raise ValueError(f"`python -m {module}` cannot be checked.")


def _check_recipe(args: list[str]) -> None:
    from moxe_plugin.cli import main

    # The run to start from does not exist.
    while "--from" in args:
        at = args.index("--from")
        args = [*args[:at], *args[at + 2 :]]

    # Composes the configuration of the preset with all that is said on top of it.
    if "--list-presets" not in args:
        args = [*args, "--dump-config"]

    main(args)


def _check_moxe(command: str, args: list[str]) -> None:
    from moxe_plugin.bench.suite import load_suite, select
    from moxe_plugin.cli import moxe_main

    # The first parser chooses the command.
    namespace = _parse(lambda: moxe_main(args), skip=1)

    if command == "bench":
        select(load_suite(namespace.suite), namespace.only, namespace.seeds)


def _check_harness(args: list[str]) -> None:
    import sys

    from lm_eval._cli import HarnessCLI
    from lm_eval.tasks import TaskManager

    from moxe_plugin.resources import resource_dir

    sys.argv = ["lm_eval", *args]
    namespace = HarnessCLI().parse_args()

    tasks = list(namespace.tasks)
    manager = TaskManager(include_path=str(resource_dir("eval_tasks")))

    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"{unknown} are not tasks of the harness or of ours.")


def _check_torchrun(args: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    namespace = get_args_parser().parse_args(args)

    if not namespace.module:
        raise ValueError("`torchrun` must be given `-m MODULE`.")

    _check_module(namespace.training_script, namespace.training_script_args)


def _check_tox(args: list[str]) -> None:
    parser = ConfigParser()
    parser.read(_TOX_INI)

    names = [args[at + 1] for at, arg in enumerate(args) if arg == "-e"]

    for name in names:
        if f"testenv:{name}" not in parser:
            raise ValueError(f"`{name}` is not an environment of {_TOX_INI}.")


def _parse(command: Any, *, skip: int) -> Namespace:
    original = ArgumentParser.parse_args
    num_parsed = 0

    def parse_args(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_parsed

        namespace = original(self, *args, **kwargs)
        num_parsed += 1

        if num_parsed > skip:
            raise _ParsedError(namespace)

        return namespace

    ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    try:
        command()
    except _ParsedError as ex:
        return ex.namespace
    finally:
        ArgumentParser.parse_args = original  # type: ignore[method-assign]

    raise AssertionError("The command parsed no options.")
