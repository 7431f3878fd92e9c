"""Plain values of a YAML file as the dataclasses of a suite, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Final


class SuiteError(ValueError):
    """Raised when a suite cannot be run as asked; the message is for the user."""


def structure_optional(kls: type[Any], content: object, source: str) -> Any:
    """Make a dataclass of plain values, or nothing of nothing.

    :param kls: The dataclass.
    :param content: The values, or ``None``.
    :param source: What error messages call them.

    :returns: The dataclass, or ``None``.
    """
    return None if content is None else structure(kls, content, source)


def structure(kls: type[Any], content: object, source: str) -> Any:
    """Make a dataclass of plain values.

    :param kls: The dataclass; nested ones stay plain.
    :param content: The values.
    :param source: What error messages call them.

    :returns: The dataclass.

    :raises SuiteError: A key is missing or not known, or a value of another type.
    """
    if not isinstance(content, dict):
        raise SuiteError(f"{source}: must be a mapping, but is {content!r} instead.")

    known = {field.name: str(field.type) for field in fields(kls)}

    for name, value in content.items():
        if name not in known:
            raise SuiteError(
                f"{source}: `{name}` is not a known key. Known keys: "
                f"{', '.join(known)}."
            )

        if not _fits(value, known[name]):
            raise SuiteError(
                f"{source}: `{name}` must be of type `{known[name]}`, but is "
                f"{value!r} instead."
            )

    try:
        return kls(**content)
    except TypeError as ex:
        raise SuiteError(f"{source}: {_describe_missing(kls, content)}.") from ex


def _fits(value: object, annotation: str) -> bool:
    kind, _, rest = annotation.partition(" | ")

    if rest == "None" and value is None:
        return True

    if rest == "str" and value == "auto":
        return True

    return _CHECKS.get(kind, _is_list_of(object))(value)


def _is(kind: type[Any] | tuple[type[Any], ...]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _is_list_of(kind: type[Any]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(_is(kind), value))


# Keys are annotations, which are text at run time; what becomes a nested dataclass is
# still a mapping.
_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    "str": _is(str),
    "int": _is(int),
    "float": _is((int, float)),
    "TaskStage": lambda value: value in ("pretrained", "finetuned"),
    "Sequence[int]": _is_list_of(int),
    "Sequence[str]": _is_list_of(str),
    "Mapping[str, Any]": _is(dict),
    "Corpus": _is(dict),
    "Instructions": _is(dict),
}


def _describe_missing(kls: type[Any], content: Mapping[str, Any]) -> str:
    missing = [
        f"`{f.name}`"
        for f in fields(kls)
        if f.name not in content
        and f.default is MISSING
        and f.default_factory is MISSING
    ]

    return f"missing keys: {', '.join(missing)}"
