"""Keeps records apart that are JSON and yet not what they should be.

:mod:`~moxe_plugin.report.run_dirs` checks files; what a metric's value is, is known by
the columns that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from moxe_plugin.report.columns import COLUMNS
from moxe_plugin.report.records import DamagedRun, RunRecord

_TEXTS: Final = ("Stage", "Split", "Time")
"""What is no number in a line of metrics."""


def split_sound(
    records: Sequence[RunRecord],
) -> tuple[list[RunRecord], list[DamagedRun]]:
    """Sort out records that numbers cannot be read off.

    :param records: The records.

    :returns: The sound ones, and the others with the reason.
    """
    sound, damaged = [], []

    for record in records:
        reason = _find_line(record) or _find_column(record)

        if reason is None:
            sound.append(record)
        else:
            damaged.append(DamagedRun(name=record.name, reason=reason))

    return sound, damaged


def _find_line(record: RunRecord) -> str | None:
    for name, lines in (("train", record.train), ("valid", record.valid)):
        for number, line in enumerate(lines, start=1):
            if key := _find_text(line):
                return (
                    f"{name}.jsonl, line {number}: `{key}` must be a number, but is "
                    f"{line[key]!r} instead."
                )

    return None


def _find_text(line: Mapping[str, Any]) -> str | None:
    for key, value in line.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)

        if key not in _TEXTS and not is_number:
            return key

    return None


def _find_column(record: RunRecord) -> str | None:
    for column in COLUMNS:
        try:
            number = column.read(record)
            if number is not None:
                column.to_scale(number)
        except (AttributeError, TypeError, ValueError, OverflowError) as ex:
            return f"`{column.heading}` cannot be read: {ex}."

    return None
