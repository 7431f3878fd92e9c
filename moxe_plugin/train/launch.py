"""Composes the configuration of a recipe from YAML, and runs the recipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fairseq2.logging import log
from fairseq2.recipe import Recipe
from fairseq2.recipe.cli import main as run_command
from fairseq2.utils.config import (
    ReplaceEnvDirective,
    ReplacePathDirective,
    StandardConfigMerger,
    StandardConfigProcessor,
)
from fairseq2.utils.env import StandardEnvironment
from fairseq2.utils.structured import StandardValueConverter, StructureError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moxe_plugin.train.error_lines import describe_config_error, shorten_trace
from moxe_plugin.train.output_dir import keep_config
from moxe_plugin.train.registry import find_preset, get_recipe_entry
from moxe_plugin.train.secrets import is_not_environment, mask_secrets


class ConfigFileError(ValueError):
    """A configuration file cannot be read."""


def load_preset(
    preset: str | None,
    overrides: Mapping[str, object] | None = None,
    *,
    recipe: str = "lm/pretrain",
    files: Sequence[Path] = (),
) -> Any:
    """Load the configuration that a preset describes.

    The ``config`` fields of ``optimizer``, ``lr_scheduler`` and ``seq_generator`` stay
    plain dictionaries, since only a running recipe knows their types;
    :func:`run_recipe` accepts them so.

    :param preset: The name of the preset; ``None`` means the default values.
    :param overrides: Values by the dotted path of their configuration key.
    :param recipe: The name of the recipe.
    :param files: YAML files that are merged into the preset, from left to right.

    :returns: An object of the recipe's configuration class, not validated yet.

    :raises ConfigFileError: A file or an override does not fit the configuration.
    """
    config_kls = get_recipe_entry(recipe).load().config_kls

    if preset is not None:
        files = [find_preset(recipe, preset), *files]

    config = compose_config(config_kls, files)

    for path, value in (overrides or {}).items():
        *parents, key = path.split(".")

        override: dict[str, object] = {"_set_": {key: value}}
        for parent in reversed(parents):
            override = {parent: override}

        config = _merge(config, override, f"The override of `{path}`")

    try:
        return StandardValueConverter().structure(config, config_kls)
    except StructureError as ex:
        raise ConfigFileError(
            f"The preset '{preset}' with its overrides does not fit "
            f"`{config_kls.__name__}`: {describe_config_error(ex)}"
        ) from ex


def compose_config(
    config_kls: type[object], files: Sequence[Path]
) -> Mapping[str, object]:
    """Merge YAML files into the default values of a configuration.

    :param config_kls: The configuration class of a recipe.
    :param files: The files, merged from left to right. ``${dir}`` in one stands for
        its directory, ``${env:NAME:default}`` for an environment variable.

    :returns: The configuration as plain values.

    :raises ConfigFileError: A file does not exist or is not valid YAML.
    """
    config = StandardValueConverter().unstructure(config_kls())

    assert isinstance(config, Mapping)

    for file in files:
        config = _merge(config, _read(file), str(file))

    return config


def check_overrides(items: Sequence[str]) -> None:
    """Check what follows ``--config`` on a command line.

    :param items: ``KEY=VALUE`` or ``del:KEY`` each.

    :raises ConfigFileError: One is neither, or its value is not valid YAML.
    """
    for item in items:
        key, separator, value = item.partition("=")

        if not (item.startswith("del:") or (key and separator)):
            raise ConfigFileError(
                f"`--config` must be followed by KEY=VALUE or del:KEY, but is '{item}' "
                "instead."
            )

        try:
            _yaml().load(value)
        except YAMLError as ex:
            reason = str(ex).splitlines()[0]

            raise ConfigFileError(
                f"`--config` must give `{key}` a value in YAML, but gives '{value}' "
                f"({reason}). Put texts with special characters in quotation marks."
            ) from None


def run_recipe(
    recipe: str | Recipe,
    config: object,
    output_dir: Path,
    *,
    quiet: bool = False,
) -> None:
    """Run a recipe in this process, as the `fairseq2` command does.

    Only from the main thread, since fairseq2 installs a signal handler.

    :param recipe: The recipe, or its name.
    :param config: The configuration: an object of its configuration class.
    :param output_dir: The output directory; if it holds an unfinished run of the same
        configuration, that run continues.
    :param quiet: Whether only the progress bar and warnings are shown.

    All errors of the recipe propagate, after fairseq2 has logged them.
    """
    if isinstance(recipe, str):
        recipe = get_recipe_entry(recipe).load()

    unstructured_config = StandardValueConverter().unstructure(config)

    assert isinstance(unstructured_config, Mapping)

    args = [str(output_dir), "--no-exit-on-error"]

    launch(recipe, unstructured_config, args, quiet=quiet)


def launch(
    recipe: Recipe,
    config: Mapping[str, object],
    args: Sequence[str],
    *,
    quiet: bool = False,
) -> None:
    """Hand a recipe and its configuration to fairseq2's command line.

    :param recipe: The recipe.
    :param config: The whole configuration as plain values.
    :param args: Further arguments of ``fairseq2.recipe.cli.main``.
    :param quiet: Whether only the progress bar and warnings are shown.
    """
    with TemporaryDirectory(prefix="moxe_plugin_") as directory:
        file = Path(directory) / "config.yaml"

        # `_set_` replaces sections, where merging would keep keys of the default values
        # that the configuration has deleted.
        _yaml().dump({"_set_": dict(config)}, file)

        # Without a terminal, rich breaks lines at column 80 and shows no progress.
        no_rich = [] if sys.stderr.isatty() else ["--no-rich"]

        # What stands first is what fairseq2 calls the command in its messages.
        argv = ["fairseq2", "--config-file", str(file), *args, *no_rich]

        with _argv(argv), _own_logger(quiet), _keep_config(args):
            run_command(recipe)


def _keep_config(args: Sequence[str]) -> AbstractContextManager[None]:
    has_output_dir = bool(args) and not args[0].startswith("-")

    return keep_config(Path(args[0])) if has_output_dir else nullcontext()


@contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    original = sys.argv

    sys.argv = argv

    try:
        yield
    finally:
        sys.argv = original


@contextmanager
def _own_logger(quiet: bool) -> Iterator[None]:
    # fairseq2 adds a file handler per run, and removes none.
    logger = log.logger

    handlers, level = logger.handlers[:], logger.level

    if quiet:
        logger.setLevel(logging.WARNING)

    filters = (is_not_environment, shorten_trace, mask_secrets)

    for filter_ in filters:
        logger.addFilter(filter_)

    # A log file on a full disk must not bury the error that tells of it.
    raises, logging.raiseExceptions = logging.raiseExceptions, False

    try:
        yield
    finally:
        for filter_ in filters:
            logger.removeFilter(filter_)

        for handler in logger.handlers[:]:
            if handler not in handlers:
                logger.removeHandler(handler)

                with suppress(OSError):
                    handler.close()

        logging.raiseExceptions = raises

        logger.setLevel(level)


def _read(file: Path) -> object:
    try:
        with file.open(encoding="utf-8") as fp:
            config = _yaml().load(fp)
    except FileNotFoundError:
        raise ConfigFileError(f"'{file}' does not exist.") from None
    except OSError as ex:
        raise ConfigFileError(f"'{file}' cannot be read: {ex.strerror}.") from None
    except (YAMLError, UnicodeDecodeError) as ex:
        raise ConfigFileError(f"'{file}' is not valid YAML: {ex}") from ex

    processor = StandardConfigProcessor([ReplaceEnvDirective(StandardEnvironment())])

    return processor.process(
        {} if config is None else config, [ReplacePathDirective(file.absolute().parent)]
    )


def _merge(
    config: Mapping[str, object], overrides: object, origin: str
) -> Mapping[str, object]:
    if not isinstance(overrides, Mapping):
        raise ConfigFileError(f"{origin} must hold a mapping of configuration keys.")

    try:
        merged = StandardConfigMerger().merge(config, overrides)
    except (TypeError, ValueError) as ex:
        raise ConfigFileError(f"{origin} cannot be merged: {ex}") from ex

    assert isinstance(merged, Mapping)

    return merged


def _yaml() -> YAML:
    # As fairseq2: PyYAML would read `1e-3` as a text.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False

    return yaml
