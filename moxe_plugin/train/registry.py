"""The recipes of the `fairseq2` command, and their presets; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moxe_plugin.resources import resource_dir

if TYPE_CHECKING:
    from fairseq2.recipe import Recipe

ENTRY_POINT_GROUP: Final = "moxe_plugin.recipes"
"""Other packages add recipes here: named ``GROUP/COMMAND``, each a ``Recipe`` class."""


class UnknownNameError(ValueError):
    """A recipe or a preset is not known; the message lists those that are."""


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """A command-line option that sets one configuration key."""

    option: str
    """The option, ``--from`` for example."""

    key: str
    """The dotted path of the configuration key."""

    help: str
    """What it means."""

    kind: type[str] | type[int] | type[bool] = str
    """The type of the value; ``bool`` makes a pair ``--x`` and ``--no-x``."""

    repeatable: bool = False
    """Whether the option may be given more than once; the key then holds a list."""


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """A recipe of the `fairseq2` command."""

    name: str
    """The group and the command: ``lm/pretrain``."""

    summary: str
    """What the recipe does, in half a line."""

    target: str
    """Where its class is: ``module:attribute``."""

    default_preset: str | None = None
    """The preset that is used if neither a preset nor a file is named."""

    shortcuts: Sequence[Shortcut] = ()
    """Options of this recipe only."""

    is_quiet: bool = False
    """Whether only warnings are logged, since people read its output as it comes."""

    def load(self) -> Recipe:
        """Import and create the recipe.

        :returns: The recipe.
        """
        module, attribute = self.target.split(":")

        recipe: Recipe = getattr(import_module(module), attribute)()

        return recipe


_FROM: Final = Shortcut(
    option="--from",
    key="pretrained.source",
    help="output directory of a training run, or name of a model asset",
)

_STEP: Final = Shortcut(
    option="--step",
    key="pretrained.step",
    kind=int,
    help="training step of the checkpoint (default: the last one)",
)

_OWN_RECIPES: Final = (
    RecipeEntry(
        name="lm/pretrain",
        summary="train a language model on tokens",
        target="moxe_plugin.train.pretrain:LMPretrainRecipe",
        default_preset="quickstart/moxe",
    ),
    RecipeEntry(
        name="lm/instruction_finetune",
        summary="train a pretrained language model on instructions",
        target="moxe_plugin.train.instruction_finetune:LMInstructionFinetuneRecipe",
        default_preset="instruct/quickstart",
        shortcuts=(_FROM, _STEP),
    ),
    RecipeEntry(
        name="lm/generate",
        summary="complete prompts",
        target="moxe_plugin.train.generate:LMGenerateRecipe",
        shortcuts=(
            _FROM,
            _STEP,
            Shortcut(
                option="--prompt",
                key="prompts",
                help="prompt to complete (repeatable)",
                repeatable=True,
            ),
            Shortcut(
                option="--prompt-file",
                key="prompt_file",
                help="file with one prompt per line, or .jsonl with `prompt` or `src`",
            ),
            Shortcut(
                option="--stream",
                key="stream",
                kind=bool,
                help="show text as it is generated (default: for one prompt, on a "
                "terminal)",
            ),
        ),
    ),
    RecipeEntry(
        name="lm/chat",
        summary="talk with a language model, on the terminal or one line per turn",
        target="moxe_plugin.train.chat:LMChatRecipe",
        shortcuts=(
            _FROM,
            _STEP,
            Shortcut(
                option="--turns",
                key="turn_format",
                help="instruction, question or messages: how the model was finetuned "
                "(default: as its training data tells)",
            ),
            Shortcut(
                option="--json",
                key="json_output",
                kind=bool,
                help="print one JSON object per answer",
            ),
        ),
        is_quiet=True,
    ),
)

_RECIPE_OF_DIR: Final = {
    "instruct": "lm/instruction_finetune",
    "generate": "lm/generate",
    "suites": None,
}
"""Whose presets a directory in ``recipes/`` holds; any other's are of `lm pretrain`."""


def list_recipes() -> list[RecipeEntry]:
    """List our recipes and those of other packages.

    :returns: The recipes, ours first.
    """
    return [*_OWN_RECIPES, *map(_to_entry, entry_points(group=ENTRY_POINT_GROUP))]


def _to_entry(entry_point: EntryPoint) -> RecipeEntry:
    dist = entry_point.dist

    return RecipeEntry(
        name=entry_point.name,
        summary="a recipe" if dist is None else f"a recipe of {dist.name}",
        target=entry_point.value,
    )


def get_recipe_entry(name: str) -> RecipeEntry:
    """Look up a recipe.

    :param name: Its group and command: ``lm/pretrain``.

    :returns: The recipe.

    :raises UnknownNameError: There is no such recipe.
    """
    entries = {entry.name: entry for entry in list_recipes()}

    if name not in entries:
        raise UnknownNameError(
            f"`name` must be one of the recipes {', '.join(entries)}, but is '{name}' "
            "instead."
        )

    return entries[name]


def list_presets(recipe: str) -> list[str]:
    """List the presets of a recipe.

    :param recipe: The name of the recipe.

    :returns: The presets: paths below ``recipes/`` without ``.yaml``.
    """
    root = resource_dir("recipes")

    names = [
        f.relative_to(root).with_suffix("").as_posix() for f in root.rglob("*.yaml")
    ]

    return sorted(n for n in names if _recipe_of(n) == recipe)


def find_preset(recipe: str, preset: str) -> Path:
    """Find the file of a preset.

    :param recipe: The name of the recipe.
    :param preset: The name of the preset.

    :returns: Its file.

    :raises UnknownNameError: The recipe has no such preset.
    """
    known = list_presets(recipe)

    if preset in known:
        return resource_dir("recipes") / f"{preset}.yaml"

    near = [n for n in known if n.rpartition("/")[2] == preset]
    near += [n for n in get_close_matches(preset, known, cutoff=0.5) if n not in near]

    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {known}."

    command = recipe.replace("/", " ")

    raise UnknownNameError(
        f"`--preset` must be a preset of `{command}`, but is '{preset}' instead. {hint}"
    )


def _recipe_of(preset: str) -> str | None:
    directory, _, rest = preset.partition("/")

    return _RECIPE_OF_DIR.get(directory, "lm/pretrain") if rest else "lm/pretrain"
