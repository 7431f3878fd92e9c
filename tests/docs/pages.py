"""The commands in the pages of the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

MARKS: Final = {
    "install": "changes the installation, or makes one",
    "gpu": "needs a GPU",
    "network": "needs the network",
    "slurm": "needs a cluster with Slurm",
    "long": "takes more than a minute",
}
"""Why the commands of a block cannot run in a test: ````` ```bash skip=gpu `````. They
are checked as far as they can be without running."""

_FENCE: Final = re.compile(
    r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of shell commands, or of Python."""

    page: str
    """The path of the page in the repository."""

    line: int
    """The line of its fence."""

    code: str
    """What a reader would type."""

    mark: str | None
    """Why it cannot run in a test, if so."""

    @property
    def place(self) -> str:
        """Where the block is."""
        return f"{self.page}:{self.line}"


def list_pages() -> list[str]:
    """List the pages whose commands are tested.

    :returns: Their paths in the repository.
    """
    docs = sorted(
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "docs").rglob("*.md")
        if "generated" not in file.parts
    )

    return ["README.md", *docs]


def read_blocks(page: str) -> list[Block]:
    """Read the blocks of a page, in order.

    :param page: The path of the page in the repository.

    :returns: The blocks of `bash` and `python`; Python becomes a command that runs it.

    :raises ValueError: A block has an unknown mark.
    """
    text = ROOT.joinpath(page).read_text(encoding="utf-8")

    blocks = []

    for match in _FENCE.finditer(text):
        if match["language"] not in ("bash", "python"):
            continue

        line = text.count("\n", 0, match.start()) + 1
        mark = _parse_mark(match["info"].strip(), f"{page}:{line}")

        code = match["code"]
        if match["language"] == "python":
            code = f"python - <<'END_OF_PYTHON'\n{code}END_OF_PYTHON\n"

        blocks.append(Block(page=page, line=line, code=code, mark=mark))

    return blocks


def _parse_mark(info: str, place: str) -> str | None:
    if not info:
        return None

    key, _, mark = info.partition("=")

    if key != "skip" or mark not in MARKS:
        raise ValueError(
            f"{place}: the mark of a block must be skip=WHY with WHY one of "
            f"{', '.join(MARKS)}, but is '{info}' instead."
        )

    return mark
