"""The paper's numbers as a page of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.files import read_json

_TITLE: Final = "# What the paper reports"


def write_paper_table(paper_file: Path, markdown_file: Path) -> None:
    """Write the tables of ``paper.json`` as Markdown.

    :param paper_file: ``{"source": text, "tables": [{"title", "note", "columns",
        "rows"}]}``; a cell that is ``null`` becomes a dash.
    :param markdown_file: The page.

    :raises DamagedRecordError: ``paper_file`` is not valid JSON.
    """
    content = read_json(paper_file)

    parts = [_TITLE, content["source"]]
    for table in content["tables"]:
        parts += [f"## {table['title']}", _table_markdown(table), table["note"]]

    markdown_file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _table_markdown(table: dict[str, Any]) -> str:
    rows = [[_format(cell) for cell in row] for row in table["rows"]]

    frame = pd.DataFrame(rows, columns=table["columns"], dtype="object")

    text: str = frame.to_markdown(
        index=False,
        disable_numparse=True,
        colalign=["left", *["right"] * (frame.shape[1] - 1)],
    )

    return text


def _format(cell: object) -> str:
    if cell is None:
        return "—"

    return f"{cell:,}" if isinstance(cell, (int, float)) else str(cell)
