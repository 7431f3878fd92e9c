"""A table that is written in several formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that is written as Markdown, CSV, LaTeX and JSON."""

    name: str
    """The stem of its files."""

    title: str
    caption: str
    """Plain text: what it shows, of which data, seeds and size."""

    cells: pd.DataFrame
    """What people read, as text."""

    numbers: pd.DataFrame
    """The same, unrounded."""

    notes: Sequence[str] = ()
    num_names: int = 1
    """Columns to the left that hold names."""
