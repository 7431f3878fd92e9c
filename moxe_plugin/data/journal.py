"""Where an interrupted build stands: the directory ``.OUT.partial`` beside ``OUT``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from fairseq2.datasets import DatasetError
from filelock import FileLock, Timeout
from typing_extensions import Self

JOURNAL_FILE: Final = "journal.json"
JOURNAL_VERSION: Final = 1


class BuildJournal:
    """The working directory of a build, locked while it is entered.

    :param output_dir: What is built. The working directory lies beside it, so that the
        result can be moved there at once.
    :param request: What is asked for, as JSON can hold it; only a build of the same is
        continued.
    :param restart: Whether an interrupted build is dropped.

    :raises DatasetError: Another process builds the same.
    :raises ValueError: There is an interrupted build of something else.
    """

    def __init__(
        self, output_dir: Path, request: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        output_dir = output_dir.absolute()

        self.path = output_dir.with_name(f".{output_dir.name}.partial")
        self._request = json.loads(json.dumps(request))
        self._restart = restart
        self._lock = FileLock(self.path / "lock", timeout=0)

    def __enter__(self) -> Self:
        """Lock the directory, made if need be."""
        self.path.mkdir(parents=True, exist_ok=True)

        try:
            self._lock.acquire()
        except Timeout:
            raise DatasetError(
                f"Another process is building in {self.path}. Wait for it, or end it."
            ) from None

        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Unlock the directory, and remove it if nothing is in it."""
        is_empty = self.path.is_dir() and {f.name for f in self.path.iterdir()} <= {
            "lock"
        }

        if is_empty:
            shutil.rmtree(self.path)

        self._lock.release()

    def read(self) -> dict[str, Any] | None:
        """Read where an interrupted build stands, or clear the directory.

        :returns: What was written last, or ``None`` if there is nothing to continue.

        :raises ValueError: The build was asked for something else.
        """
        file = self.path / JOURNAL_FILE
        state = None

        if not self._restart and file.is_file():
            state = self._parse(file)

        # Without the shards the build was finished, and ended before it could clear.
        if state is None or not self.path.joinpath("shards").is_dir():
            self._clear()

            return None

        if state["request"] != self._request:
            changes = _list_changes(state["request"], self._request)

            raise ValueError(
                f"{self.path} holds an interrupted build with other arguments or "
                f"files: {'; '.join(changes)}. Bring the old ones back to continue it, "
                "or give `--restart` to begin anew."
            )

        progress: dict[str, Any] = state["progress"]

        return progress

    def _parse(self, file: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))

            if state["version"] == JOURNAL_VERSION:
                return state
        except (ValueError, KeyError, TypeError):
            pass

        raise ValueError(
            f"{file} of an interrupted build is damaged or of another version. Give "
            "`--restart` to begin anew."
        )

    def _clear(self) -> None:
        # The journal first: nothing may be continued that is removed in part.
        self.path.joinpath(JOURNAL_FILE).unlink(missing_ok=True)

        for file in self.path.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != "lock":
                file.unlink()

    def write(self, progress: Mapping[str, Any]) -> None:
        """Replace the journal at once.

        :param progress: Where the build stands; what it tells of must be on the disk.
        """
        state = {
            "version": JOURNAL_VERSION,
            "request": self._request,
            "progress": progress,
        }

        tmp_file = self.path / f"{JOURNAL_FILE}.tmp"

        with tmp_file.open("w", encoding="utf-8") as fp:
            json.dump(state, fp)
            fp.flush()
            os.fsync(fp.fileno())

        tmp_file.replace(self.path / JOURNAL_FILE)


def _list_changes(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []

        for key in [*old, *(k for k in new if k not in old)]:
            place = f"{name}.{key}" if name else key
            changes += _list_changes(old.get(key), new.get(key), place)

        return changes

    return [] if old == new else [f"`{name}` was {old!r}, but is {new!r}"]
