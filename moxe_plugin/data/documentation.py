"""Finds the English documentation that every installation carries.

Sources are parsed, never imported: reading the docstrings of a package costs no more
than its files, and runs none of its code.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from inspect import cleandoc
from pathlib import Path
from typing import Final, Literal

SKIPPED_DIRS: Final = frozenset(
    {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests"}
    | {"dist-packages", "_vendor", "externals", "turtledemo"}
)

STDLIB: Final = "python"
"""Names the docstrings of the standard library in a list of sources."""

TOPICS: Final = "topics"
"""Names the language reference that ``help()`` shows in a list of sources."""


@dataclass(frozen=True)
class DocEntry:
    """One piece of documentation, not yet cleaned."""

    kind: Literal["module", "class", "function", "topic"]
    """What is documented."""

    name: str
    """The qualified name or the heading."""

    signature: str
    """The parameters of a function, in parentheses; otherwise empty."""

    text: str
    """The docstring or section."""


def get_versions(packages: list[str]) -> dict[str, str]:
    """Look up which version of each package is installed.

    :param packages: Names of distributions.

    :returns: The versions; packages that are not installed are left out.
    """
    versions = {}

    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue

    return versions


def list_files(package: str) -> list[tuple[str, Path]]:
    """List the source files of a package or of the standard library.

    :param package: The name of a top-level module, or :data:`STDLIB`.

    :returns: Pairs of module name and file, in order of name.
    """
    if package == STDLIB:
        root, prefix = Path(sysconfig.get_paths()["stdlib"]), ""
    else:
        spec = PathFinder.find_spec(package)

        if spec is None or not spec.submodule_search_locations:
            return []

        root, prefix = Path(next(iter(spec.submodule_search_locations))), package

    files = []

    for dir_name, sub_dirs, file_names in os.walk(root):
        sub_dirs[:] = [d for d in sub_dirs if d not in SKIPPED_DIRS]

        for file in (Path(dir_name, f) for f in file_names if f.endswith(".py")):
            parts = file.relative_to(root).with_suffix("").parts
            names = [prefix, *parts] if prefix else list(parts)
            files.append((".".join(names).removesuffix(".__init__"), file))

    return sorted(files)


def read_docstrings(module: str, file: Path) -> Iterator[DocEntry]:
    """Read the docstrings of a module, its classes and its functions.

    Private names are left out.

    :param module: The name of the module.
    :param file: Its source; one that cannot be parsed has no docstrings.

    :yields: The docstrings, in order.
    """
    try:
        tree = ast.parse(file.read_bytes())
    # Files for other versions of Python, and templates.
    except (SyntaxError, ValueError):
        tree = ast.Module([], [])

    if text := ast.get_docstring(tree):
        yield DocEntry("module", module, "", text)

    yield from _walk(tree, module)


def _walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[DocEntry]:
    for child in node.body:
        if isinstance(child, ast.If | ast.Try):
            # Definitions that depend on the platform.
            yield from _walk(ast.Module(child.body, []), prefix)

        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue

        if child.name.startswith("_"):
            continue

        name = f"{prefix}.{child.name}"
        text = ast.get_docstring(child)

        if isinstance(child, ast.ClassDef):
            if text:
                yield DocEntry("class", name, "", text)

            yield from _walk(child, name)
        elif text:
            yield DocEntry("function", name, _get_signature(child.args), text)


def _get_signature(args: ast.arguments) -> str:
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]

    return "(" + ", ".join(n for n in names if n not in ("self", "cls")) + ")"


def read_topics() -> Iterator[DocEntry]:
    """Read the sections of the language reference that ``help()`` shows.

    :yields: The sections, in order of topic.
    """
    file = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")

    # Some distributions leave it out.
    source = file.read_bytes() if file.exists() else b""

    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)

            for topic, text in sorted(topics.items()):
                yield from _split_sections(topic, text)


def _split_sections(heading: str, text: str) -> Iterator[DocEntry]:
    lines: list[str] = []

    def close() -> Iterator[DocEntry]:
        if lines:
            yield DocEntry("topic", heading, "", cleandoc("\n".join(lines)))

    for line in text.splitlines():
        is_underline = len(line) > 2 and len(set(line)) == 1 and line[0] in "*=-~^"

        if is_underline and lines and lines[-1].strip():
            next_heading = lines.pop().strip()
            yield from close()
            heading, lines = next_heading, []
        else:
            lines.append(line)

    yield from close()
