"""Finds the YAML that this package carries, in a wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, get_args

ResourceName = Literal["recipes", "eval_tasks"]

_PACKAGED: Final = Path(__file__).resolve().parent
_CHECKOUT: Final = _PACKAGED.parents[1]


def resource_dir(name: ResourceName) -> Path:
    """Find the directory of the recipes or of the evaluation tasks.

    A wheel holds them beside this module; an editable install reads them from the
    root of the checkout, so that an edit takes effect at once.

    :param name: Which of the two.

    :returns: An existing directory.

    :raises ValueError: ``name`` is not the name of a resource.
    :raises FileNotFoundError: The installation lacks the directory.
    """
    if name not in get_args(ResourceName):
        known = ", ".join(get_args(ResourceName))
        raise ValueError(f"`name` must be one of {known}, but is '{name}' instead.")

    for parent in (_PACKAGED, _CHECKOUT):
        directory = parent / name
        if directory.is_dir():
            return directory

    raise FileNotFoundError(
        f"The `{name}` directory is neither in '{_PACKAGED}' nor in '{_CHECKOUT}'. "
        "Reinstall moxe-plugin."
    )
