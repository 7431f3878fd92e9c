"""JSON files: what is read is whole and finite, what is written replaces at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class DamagedRecordError(ValueError):
    """Raised when a file of a run record cannot be trusted."""


def read_json(file: Path) -> dict[str, Any]:
    """Read one JSON object.

    :param file: The file.

    :returns: The object.

    :raises DamagedRecordError: The file is missing, is no JSON object, or holds NaN or
        an infinity.
    """
    return _parse_object(read_text(file), file.name)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object a line.

    :param file: The file.

    :returns: The objects in order.

    :raises DamagedRecordError: As :func:`read_json`, also for a last line without its
        line break.
    """
    text = read_text(file)

    if text and not text.endswith("\n"):
        raise DamagedRecordError(f"{file.name}: the last line is truncated.")

    return [
        _parse_object(line, f"{file.name}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
    ]


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object so that a reader sees the old file or the whole new one.

    NaN is written as it is: hiding a failed run is the reader's decision, not ours.

    :param file: The file.
    :param content: The object. A tuple becomes a list.
    """
    write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one.

    :param file: The file.
    :param text: Its content.
    """
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file by one that is whole and on the disk, or not at all.

    :param file: The file.

    :yields: Where to write the new one.
    """
    part = file.with_name(file.name + ".part")

    try:
        yield part

        with part.open("rb+") as written:
            os.fsync(written.fileno())

        os.replace(part, file)
    except BaseException:
        # A full disk, for example, of which this would take some more
        part.unlink(missing_ok=True)

        raise


def read_text(file: Path) -> str:
    """Read a file of a run record.

    :param file: The file.

    :returns: Its content.

    :raises DamagedRecordError: The file is missing, or not UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedRecordError(f"{file.name} is missing.") from None
    except UnicodeDecodeError:
        raise DamagedRecordError(f"{file.name} is not UTF-8 text.") from None


def _parse_object(text: str, source: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise DamagedRecordError(f"{source}: a value is {constant}.")

    try:
        content = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as ex:
        raise DamagedRecordError(f"{source}: not valid JSON ({ex.msg}).") from None

    if not isinstance(content, dict):
        raise DamagedRecordError(f"{source}: not a JSON object.")

    return content
