"""Writes the token stream of one split as shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from moxe_plugin.data.append_file import AppendFile
from moxe_plugin.data.manifest import (
    DTYPES,
    FileInfo,
    ShardManifest,
    SplitInfo,
    compute_sha256,
)

_OFFSET_DTYPE: Final = np.dtype("<i8")


class SplitWriter:
    """Writes the stream of one split as shards.

    :param path: The directory of the shards.
    :param name: The name of the split.
    :param manifest: Has the tokenizer's facts.
    :param max_shard_tokens: The size at which the next shard begins.
    :param offsets_file: Where to keep the beginnings of documents until the end.
    :param state: The state of the writer to continue.

    :raises DatasetError: What the earlier writer wrote is damaged.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        manifest: ShardManifest,
        max_shard_tokens: int,
        offsets_file: Path,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._path = path
        self._name = name
        self._dtype = DTYPES[manifest.dtype]
        self._vocab_size = manifest.vocab_size
        self._eos_idx = manifest.eos_idx
        self._max_shard_tokens = max_shard_tokens

        self._shards: list[AppendFile] = []
        self._num_bytes = 0
        self.num_tokens = 0
        """The length of the stream, separators included."""

        if state is None:
            self._offsets = AppendFile(offsets_file)
            self._append([self._eos_idx])
            self._append_offset()
        else:
            self._offsets = AppendFile(offsets_file, state["offsets"])
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._num_bytes = int(state["num_bytes"])
        self.num_tokens = int(state["num_tokens"])

        for idx, shard_state in enumerate(state["shards"]):
            self._close_shard()
            self._shards.append(AppendFile(self._shard_file(idx), shard_state))

    def add_document(self, tokens: Sequence[int], num_bytes: int) -> None:
        """Append a document.

        :param tokens: Token ids, without separators.
        :param num_bytes: The size of the document as UTF-8 text.

        :raises ValueError: A token is not in the vocabulary.
        """
        self._append([*tokens, self._eos_idx])
        self._append_offset()
        self._num_bytes += num_bytes

    def _append(self, tokens: Sequence[int]) -> None:
        array = np.asarray(tokens, dtype=np.int64)

        if array.min() < 0 or array.max() >= self._vocab_size:
            raise ValueError(
                f"`tokens` must be less than the vocabulary size ({self._vocab_size}), "
                f"but range from {array.min()} to {array.max()} instead."
            )

        max_num_bytes = self._max_shard_tokens * self._dtype.itemsize

        if not self._shards or self._shards[-1].num_bytes >= max_num_bytes:
            self._close_shard()
            self._shards.append(AppendFile(self._shard_file(len(self._shards))))

        self._shards[-1].append(array.astype(self._dtype).tobytes())
        self.num_tokens += len(array)

    def _append_offset(self) -> None:
        self._offsets.append(np.asarray(self.num_tokens, _OFFSET_DTYPE).tobytes())

    def _shard_file(self, idx: int) -> Path:
        return self._path / f"{self._name}_{idx:05}.bin"

    def _close_shard(self) -> None:
        # The next one follows: a whole shard must be on the disk before it is closed.
        if self._shards:
            self._shards[-1].sync()
            self._shards[-1].close()

    @property
    def files(self) -> list[Path]:
        """What is written to."""
        return [f.file for f in (*self._shards, self._offsets)]

    def sync(self) -> dict[str, Any]:
        """Bring every document added so far to the disk.

        :returns: The state that another writer can continue from.
        """
        return {
            "num_tokens": self.num_tokens,
            "num_bytes": self._num_bytes,
            "offsets": self._offsets.sync(),
            "shards": [
                *(shard.state for shard in self._shards[:-1]),
                self._shards[-1].sync(),
            ],
        }

    def abandon(self) -> None:
        """Stop writing, but leave what was written."""
        for file in (*self._shards, self._offsets):
            file.abandon()

    def close(self) -> SplitInfo:
        """Write what is left.

        :returns: The split's part of the manifest.
        """
        self._close_shard()
        self._offsets.close()

        shards = [
            FileInfo(
                file=shard.file.name,
                num_items=shard.num_bytes // self._dtype.itemsize,
                sha256=shard.sha256,
            )
            for shard in self._shards
        ]

        file = self._path / f"{self._name}_offsets.npy"
        offsets = np.fromfile(self._offsets.file, dtype=_OFFSET_DTYPE)
        np.save(file, offsets.astype(np.int64))

        return SplitInfo(
            num_tokens=self.num_tokens,
            num_documents=len(offsets) - 1,
            num_bytes=self._num_bytes,
            shards=shards,
            offsets=FileInfo(
                file=file.name,
                num_items=len(offsets),
                sha256=compute_sha256(file),
            ),
        )
