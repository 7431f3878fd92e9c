"""Token shards: a directory of token ids and the manifest that describes it.

The token stream of a split is ``eos d_1 eos d_2 eos ... d_n eos``: every token but the
first is a target once, the first token of a document is predicted from ``eos``, and
the sum of the losses over the UTF-8 size of the documents gives bits per byte.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from fairseq2.datasets import DatasetError
from numpy.typing import NDArray

from moxe_plugin.data.manifest import (
    DTYPES,
    MANIFEST_FILE,
    FileInfo,
    ShardManifest,
    SplitInfo,
    compute_sha256,
    read_manifest,
)

REBUILD: Final = (
    "Copy the directory again, or build it again with `moxe data build --overwrite`."
)


class TokenStream:
    """The tokens of one split, memory-mapped.

    :param path: The shard directory.
    :param info: The split's part of the manifest.
    :param dtype: The type of a stored token.
    :param vocab_size: The number that every token must be less than.
    """

    def __init__(
        self, path: Path, info: SplitInfo, dtype: np.dtype[Any], vocab_size: int
    ) -> None:
        self.info = info
        self._path = path
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._shards = [
            np.memmap(path / s.file, dtype=dtype, mode="r") for s in info.shards
        ]
        self._starts = np.cumsum([0] + [s.num_items for s in info.shards])

    def __len__(self) -> int:
        """Count the tokens."""
        return self.info.num_tokens

    def compute_sha256(self) -> str:
        """Compute a digest of the stream from those of its shards in the manifest.

        :returns: The digest, in hexadecimal.
        """
        digests = " ".join(shard.sha256 for shard in self.info.shards)

        return sha256(digests.encode()).hexdigest()

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read the tokens ``[start, stop)`` of the stream, across shards.

        :param start: The position of the first token.
        :param stop: The position after the last token.

        :returns: Token ids. *Shape:* ``(stop - start)``.

        :raises DatasetError: A token is not in the vocabulary.
        :raises ValueError: The range does not lie within the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"`start` and `stop` must lie within the stream of {len(self)} "
                f"tokens, but are {start} and {stop} instead."
            )

        output = np.empty(stop - start, dtype=np.int64)
        idx = int(np.searchsorted(self._starts, start, side="right")) - 1

        position = start
        while position < stop:
            shard_start, shard_stop = self._starts[idx], self._starts[idx + 1]
            end = min(stop, int(shard_stop))
            tokens = self._shards[idx][position - shard_start : end - shard_start]

            if tokens.max() >= self._vocab_size:
                file = self._path / self.info.shards[idx].file
                raise DatasetError(
                    f"{file} is damaged: it has the token {tokens.max()}, but the "
                    f"vocabulary has {self._vocab_size} entries. {REBUILD}"
                )

            output[position - start : end - start] = tokens
            position = end
            idx += 1

        return output

    def offsets(self) -> NDArray[np.int64]:
        """Read where the documents begin.

        :returns: Positions in the stream. *Shape:* ``(num_documents + 1)``.
        """
        offsets: NDArray[np.int64] = np.load(self._path / self.info.offsets.file)

        return offsets


class TokenShards:
    """An open shard directory.

    :param path: The directory.
    :param manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: ShardManifest) -> None:
        self.path = path
        self.manifest = manifest

    def stream(self, split: str) -> TokenStream:
        """Open the token stream of a split.

        :param split: A key of ``manifest.splits``.

        :returns: The stream.
        """
        dtype = DTYPES[self.manifest.dtype]

        return TokenStream(
            self.path, self.manifest.splits[split], dtype, self.manifest.vocab_size
        )


def open_shards(path: Path, *, verify: bool = False) -> TokenShards:
    """Open a shard directory and check that its files have the stated sizes.

    :param path: The directory.
    :param verify: Whether to read every file and compare its digest too.

    :returns: The open directory.

    :raises DatasetError: The directory is damaged or not a shard directory.
    """
    manifest = read_manifest(path)
    item_size = DTYPES[manifest.dtype].itemsize

    for name, split in manifest.splits.items():
        total = sum(s.num_items for s in split.shards)
        if total != split.num_tokens:
            raise DatasetError(
                f"{path / MANIFEST_FILE} is damaged: the shards of the {name} split "
                f"have {total} tokens, but `num_tokens` is {split.num_tokens}. "
                f"{REBUILD}"
            )

        for shard in split.shards:
            _check_file(path, shard, shard.num_items * item_size, verify)

        _check_file(path, split.offsets, None, verify)

    return TokenShards(path, manifest)


def _check_file(path: Path, info: FileInfo, size: int | None, verify: bool) -> None:
    file = path / info.file

    try:
        actual_size = file.stat().st_size
    except FileNotFoundError:
        raise DatasetError(
            f"{file} is named in the manifest, but missing. {REBUILD}"
        ) from None

    if size is not None and actual_size != size:
        raise DatasetError(
            f"{file} is damaged: it must have {size} bytes, but has {actual_size}. "
            f"{REBUILD}"
        )

    if verify and compute_sha256(file) != info.sha256:
        raise DatasetError(
            f"{file} is damaged: its sha256 differs from the manifest. {REBUILD}"
        )
