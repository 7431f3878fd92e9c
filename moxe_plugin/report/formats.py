"""Tables as Markdown, CSV, LaTeX and JSON, the same bytes on every machine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moxe_plugin.report.files import replacing, write_json

DASH: Final = "—"
"""What stands for a number that does not exist."""

_DIGITS: Final = 10
"""Significant digits in files: linear algebra differs in the last ones by machine."""

_LATEX_SIGNS: Final = {
    "±": r"$\pm$",
    "—": "---",
    "\u03b3": r"$\gamma$",
    "\u03bb": r"$\lambda$",
}


def markdown_table(cells: pd.DataFrame, *, num_names: int = 1) -> str:
    """Write a table as Markdown.

    :param cells: Text cells.
    :param num_names: Columns to the left that hold names; numbers go to the right.

    :returns: The table.
    """
    text: str = cells.map(_escape_markdown).to_markdown(
        index=False,
        disable_numparse=True,
        colalign=["left"] * num_names + ["right"] * (cells.shape[1] - num_names),
    )

    return text


def latex_table(
    cells: pd.DataFrame, *, caption: str, label: str, num_names: int = 1
) -> str:
    r"""Write a table as LaTeX with the rules of ``booktabs``.

    :param cells: Text cells.
    :param caption: Plain text.
    :param label: What ``\ref`` finds it by.
    :param num_names: As in :func:`markdown_table`.

    :returns: A ``table`` environment.
    """
    plain = cells.rename(columns=_escape_latex).map(_escape_latex)

    text: str = plain.to_latex(
        index=False,
        escape=False,
        caption=_escape_latex(caption),
        label=label,
        column_format="l" * num_names + "r" * (cells.shape[1] - num_names),
    )

    return text


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write numbers as CSV; what does not exist is an empty cell.

    :param frame: The numbers.
    :param file: The file.
    """
    with replacing(file) as part:
        frame.to_csv(
            part, index=False, lineterminator="\n", float_format=f"%.{_DIGITS}g"
        )


def write_rounded_json(content: Mapping[str, Any], file: Path) -> None:
    """Write numbers as JSON; what does not exist is ``null``.

    :param content: The content.
    :param file: The file.
    """
    write_json(file, _round(content))


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None

    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}

    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_round(item) for item in value]

    return value


def _escape_markdown(text: str) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")

    # What begins like a tag of HTML would be one.
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _escape_latex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        **_LATEX_SIGNS,
    }

    # `[` after a line break of a table would be its optional argument.
    return "".join(special.get(sign, sign) for sign in text).replace("[", "{[}")
