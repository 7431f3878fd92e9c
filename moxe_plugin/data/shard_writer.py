"""Writes a directory of token shards."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import BinaryIO, Final

import numpy as np
from fairseq2.datasets import DatasetError
from typing_extensions import Self

from moxe_plugin.data.manifest import (
    DTYPES,
    MANIFEST_FILE,
    FileInfo,
    ShardManifest,
    SplitInfo,
    compute_sha256,
)
from moxe_plugin.data.shards import open_shards

MAX_SHARD_TOKENS: Final = 1 << 27


class ShardWriter:
    """Writes token shards next to their destination and moves them there at the end.

    A context manager: leaving it normally publishes the directory at once, leaving it
    by an exception removes what was written.

    :param path: The directory to make.
    :param tokenizer_name: Where the tokenizer came from.
    :param tokenizer_sha256: The digest of its ``tokenizer.json``.
    :param vocab_size: The size of its vocabulary, added tokens included.
    :param eos_idx: The id that separates documents.
    :param source: Where the text came from.
    :param overwrite: Whether an existing directory is replaced.
    :param max_shard_tokens: The size at which the next shard of a split begins.

    :raises FileExistsError: ``path`` exists and ``overwrite`` is ``False``.
    :raises ValueError: ``path`` exists and is no directory of token shards.
    """

    def __init__(
        self,
        path: Path,
        *,
        tokenizer_name: str,
        tokenizer_sha256: str,
        vocab_size: int,
        eos_idx: int,
        source: str,
        overwrite: bool = False,
        max_shard_tokens: int = MAX_SHARD_TOKENS,
    ) -> None:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} already exists.")

        if path.exists() and not (path / MANIFEST_FILE).is_file():
            raise ValueError(
                f"{path} is not replaced: it has no {MANIFEST_FILE}, so it is no "
                "directory of token shards. Choose another one, or remove it yourself."
            )

        self._path = path
        self._max_shard_tokens = max_shard_tokens
        self._splits: dict[str, _SplitWriter] = {}
        self._manifest = ShardManifest(
            tokenizer_name=tokenizer_name,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            eos_idx=eos_idx,
            dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
            source=source,
        )

        path.parent.mkdir(parents=True, exist_ok=True)
        self._tmp_path = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))

    def add_document(self, split: str, tokens: Sequence[int], num_bytes: int) -> None:
        """Append a document to a split.

        :param split: The name of the split; it begins with its first document.
        :param tokens: Token ids, without separators.
        :param num_bytes: The size of the document as UTF-8 text.

        :raises ValueError: A token is not in the vocabulary.
        """
        writer = self._splits.get(split)

        if writer is None:
            writer = _SplitWriter(
                self._tmp_path, split, self._manifest, self._max_shard_tokens
            )
            self._splits[split] = writer

        writer.add_document(tokens, num_bytes)

    def close(self) -> ShardManifest:
        """Write the manifest, check the result and move it to its destination.

        :returns: The manifest.

        :raises DatasetError: No document was added, or the written files are damaged.
        """
        if not self._splits:
            self.discard()

            raise DatasetError("There is nothing to write: no document has any text.")

        for name, writer in self._splits.items():
            self._manifest.splits[name] = writer.close()

        self._manifest.write(self._tmp_path)
        open_shards(self._tmp_path, verify=True)

        # mkdtemp makes private directories.
        self._tmp_path.chmod(0o755)

        if self._path.exists():
            shutil.rmtree(self._path)

        self._tmp_path.rename(self._path)

        return self._manifest

    @property
    def manifest(self) -> ShardManifest:
        """The manifest, complete once the writer is closed."""
        return self._manifest

    def discard(self) -> None:
        """Remove what was written."""
        for writer in self._splits.values():
            writer.abort()

        shutil.rmtree(self._tmp_path)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Publish the directory, or discard it if there was an exception."""
        if kls is None:
            self.close()
        else:
            self.discard()


class _SplitWriter:
    def __init__(
        self, path: Path, name: str, manifest: ShardManifest, max_shard_tokens: int
    ) -> None:
        self._path = path
        self._name = name
        self._dtype = DTYPES[manifest.dtype]
        self._vocab_size = manifest.vocab_size
        self._eos_idx = manifest.eos_idx
        self._max_shard_tokens = max_shard_tokens

        self._shard_sizes: list[int] = []
        self._fp: BinaryIO | None = None
        self._num_bytes = 0
        self._offsets: list[int] = []
        self.num_tokens = 0

        self._append([self._eos_idx])
        self._offsets.append(self.num_tokens)

    def add_document(self, tokens: Sequence[int], num_bytes: int) -> None:
        self._append([*tokens, self._eos_idx])
        self._offsets.append(self.num_tokens)
        self._num_bytes += num_bytes

    def _append(self, tokens: Sequence[int]) -> None:
        array = np.asarray(tokens, dtype=np.int64)

        if array.min() < 0 or array.max() >= self._vocab_size:
            raise ValueError(
                f"`tokens` must be less than the vocabulary size ({self._vocab_size}), "
                f"but range from {array.min()} to {array.max()} instead."
            )

        if self._fp is None or self._shard_sizes[-1] >= self._max_shard_tokens:
            self.abort()
            self._fp = self._shard_file(len(self._shard_sizes)).open("wb")
            self._shard_sizes.append(0)

        self._fp.write(array.astype(self._dtype).tobytes())
        self._shard_sizes[-1] += len(array)
        self.num_tokens += len(array)

    def _shard_file(self, idx: int) -> Path:
        return self._path / f"{self._name}_{idx:05}.bin"

    def abort(self) -> None:
        if self._fp is not None:
            self._fp.close()

    def close(self) -> SplitInfo:
        self.abort()

        shards = []

        for idx, size in enumerate(self._shard_sizes):
            file = self._shard_file(idx)
            digest = compute_sha256(file)
            shards.append(FileInfo(file=file.name, num_items=size, sha256=digest))

        file = self._path / f"{self._name}_offsets.npy"
        np.save(file, np.asarray(self._offsets, dtype=np.int64))

        return SplitInfo(
            num_tokens=self.num_tokens,
            num_documents=len(self._offsets) - 1,
            num_bytes=self._num_bytes,
            shards=shards,
            offsets=FileInfo(
                file=file.name,
                num_items=len(self._offsets),
                sha256=compute_sha256(file),
            ),
        )
