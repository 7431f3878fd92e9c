"""A file that only grows, and that a later process can go on writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from fairseq2.datasets import DatasetError

_CHUNK_SIZE = 1 << 20


class AppendFile:
    """A file that only grows.

    What was in it at the last :meth:`sync` survives the end of the process, and a
    process that is given its state goes on from there: what came after is cut off.

    :param file: The file; made, unless there is a state.
    :param state: What :meth:`sync` returned.

    :raises DatasetError: The file does not begin as it did at the last :meth:`sync`.
    """

    def __init__(self, file: Path, state: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self.num_bytes = 0
        self._digest = sha256()

        if state is None:
            self._fp = file.open("wb", buffering=_CHUNK_SIZE)
        else:
            self._restore(int(state["num_bytes"]), str(state["sha256"]))
            self._fp = file.open("ab", buffering=_CHUNK_SIZE)

    def _restore(self, num_bytes: int, digest: str) -> None:
        try:
            with self.file.open("r+b") as fp:
                num_left = num_bytes

                while chunk := fp.read(min(num_left, _CHUNK_SIZE)):
                    self._digest.update(chunk)
                    num_left -= len(chunk)

                fp.truncate(num_bytes)
        except FileNotFoundError:
            raise self._damaged("is missing") from None

        if num_left or self._digest.hexdigest() != digest:
            raise self._damaged("is damaged")

        self.num_bytes = num_bytes

    def _damaged(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.file} of an interrupted build {what}, so that it cannot be "
            "continued. Begin anew with `--restart`."
        )

    def append(self, data: bytes) -> None:
        """Write at the end.

        :param data: What to write.
        """
        self._fp.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def sync(self) -> dict[str, Any]:
        """Bring everything written so far to the disk.

        :returns: The state to go on from.
        """
        self._fp.flush()
        os.fsync(self._fp.fileno())

        return self.state

    @property
    def state(self) -> dict[str, Any]:
        """What a later process goes on from, if everything is on the disk."""
        return {"num_bytes": self.num_bytes, "sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """The digest of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._fp.close()

    def abandon(self) -> None:
        """Close the file; what is buffered may be lost."""
        # A full disk, say, is the reason to abandon it.
        with suppress(OSError):
            self._fp.close()
