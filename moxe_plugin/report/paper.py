"""The paper's numbers, and a page of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.files import DamagedRecordError, read_json
from moxe_plugin.report.formats import DASH, markdown_table

_TITLE: Final = "# What the paper reports"

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper."""

    key: str
    """``table1`` or ``table2``."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """One cell a column; ``None`` for none."""

    systems: Sequence[Sequence[str]]
    """For each row our systems that it is about, by their names in suites."""


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A figure of the paper, which we know by what the text says of it."""

    figure: str
    subject: str
    says: str
    """What the text says of it; the figure's own numbers are not in the text."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the paper reports."""

    source: str
    tables: Sequence[PaperTable] = field(default=())
    figures: Sequence[PaperFigure] = field(default=())

    def table(self, key: str) -> PaperTable | None:
        """Find a table.

        :param key: Its key.

        :returns: The table, if it is there.
        """
        return next((table for table in self.tables if table.key == key), None)

    def figure(self, name: str) -> PaperFigure | None:
        """Find a figure.

        :param name: Its number, such as ``3a``.

        :returns: The figure, if it is there.
        """
        return next((figure for figure in self.figures if figure.figure == name), None)


def read_paper(file: Path) -> Paper:
    """Read ``paper.json``.

    :param file: The file.

    :returns: The paper's numbers.

    :raises DamagedRecordError: The file is no JSON, or lacks something.
    """
    content = read_json(file)

    try:
        paper = Paper(
            source=content["source"],
            tables=[PaperTable(**table) for table in content["tables"]],
            figures=[PaperFigure(**figure) for figure in content["figures"]],
        )
    except (KeyError, TypeError) as ex:
        raise DamagedRecordError(f"{file.name}: not in the known form ({ex}).") from ex

    for table in paper.tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise DamagedRecordError(
                f"{file.name}: the rows of {table.key} must have "
                f"{len(table.columns)} cells."
            )

        if len(table.systems) != len(table.rows):
            raise DamagedRecordError(
                f"{file.name}: `systems` of {table.key} must have one entry a row."
            )

    return paper


def paper_markdown(paper: Paper) -> str:
    """Write the page of the paper's numbers.

    :param paper: The numbers.

    :returns: Markdown.
    """
    parts = [_TITLE, paper.source]

    for table in paper.tables:
        parts += [f"## {table.title}", markdown_table(paper_cells(table)), table.note]

    if paper.figures:
        lines = [
            f"- **Figure {f.figure}**, {f.subject}: {f.says}" for f in paper.figures
        ]
        parts += ["## Figures", "\n".join(lines)]

    return "\n\n".join(parts) + "\n"


def paper_cells(table: PaperTable) -> pd.DataFrame:
    """Format a table of the paper.

    :param table: The table.

    :returns: Text cells.
    """
    rows = [[format_paper_cell(cell) for cell in row] for row in table.rows]

    frame: pd.DataFrame = pd.DataFrame(
        rows, columns=list(table.columns), dtype="object"
    )

    return frame


def format_paper_cell(cell: Any) -> str:
    """Format a number of the paper as it is printed there.

    :param cell: The number, text, or ``None``.

    :returns: The text; a dash for ``None``.
    """
    if cell is None:
        return DASH

    return f"{cell:,}" if isinstance(cell, (int, float)) else str(cell)
