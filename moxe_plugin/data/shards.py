"""Token shards: a directory of token ids and the manifest that describes it.

The token stream of a split is ``eos d_1 eos d_2 eos ... d_n eos``: every token but the
first is a target once, the first token of a document is predicted from ``eos``, and
the sum of the losses over the UTF-8 size of the documents gives bits per byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from fairseq2.datasets import DatasetError
from numpy.typing import NDArray

MANIFEST_FILE: Final = "manifest.json"
FORMAT_VERSION: Final = 1
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}


@dataclass(kw_only=True)
class FileInfo:
    """A file of a shard directory."""

    file: str
    """The name, relative to the directory."""

    num_items: int
    """The number of tokens (or offsets) in the file."""

    sha256: str
    """The digest of the file."""


@dataclass(kw_only=True)
class SplitInfo:
    """One token stream."""

    num_tokens: int
    """The length of the stream, separators included."""

    num_documents: int
    """The number of documents."""

    num_bytes: int
    """The size of the documents as UTF-8 text, for bits per byte."""

    shards: list[FileInfo]
    """The pieces of the stream, in order."""

    offsets: FileInfo
    """Where documents begin: an ``.npy`` of ``num_documents + 1`` positions. Document
    ``i`` is ``[offsets[i], offsets[i+1])`` of the stream, closing ``eos`` included."""


@dataclass(kw_only=True)
class ShardManifest:
    """What a shard directory holds and how it was made."""

    format_version: int = FORMAT_VERSION
    """The version of this layout."""

    tokenizer_name: str
    """Where the tokenizer came from, for humans."""

    tokenizer_sha256: str
    """The digest of its ``tokenizer.json``."""

    vocab_size: int
    """The size of its vocabulary, added tokens included."""

    eos_idx: int
    """The id that separates documents."""

    dtype: str
    """``uint16`` or ``uint32``, little-endian."""

    source: str
    """Where the text came from."""

    splits: dict[str, SplitInfo] = field(default_factory=dict)
    """The token streams by name."""

    def write(self, path: Path) -> None:
        """Write the manifest into the directory ``path``.

        :param path: The shard directory.
        """
        text = json.dumps(asdict(self), indent=2) + "\n"

        path.joinpath(MANIFEST_FILE).write_text(text, encoding="utf-8")


class TokenStream:
    """The tokens of one split, memory-mapped.

    :param path: The shard directory.
    :param info: The split's part of the manifest.
    :param dtype: The type of a stored token.
    """

    def __init__(self, path: Path, info: SplitInfo, dtype: np.dtype[Any]) -> None:
        self.info = info
        self._path = path
        self._dtype = dtype
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

        return hashlib.sha256(digests.encode()).hexdigest()

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read the tokens ``[start, stop)`` of the stream, across shards.

        :param start: The position of the first token.
        :param stop: The position after the last token.

        :returns: Token ids. *Shape:* ``(stop - start)``.

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
            output[position - start : end - start] = self._shards[idx][
                position - shard_start : end - shard_start
            ]
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

        return TokenStream(self.path, self.manifest.splits[split], dtype)


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
                f"have {total} tokens, but `num_tokens` is {split.num_tokens}."
            )

        for shard in split.shards:
            _check_file(path, shard, shard.num_items * item_size, verify)

        _check_file(path, split.offsets, None, verify)

    return TokenShards(path, manifest)


def read_manifest(path: Path) -> ShardManifest:
    """Read the manifest of a shard directory.

    :param path: The directory.

    :returns: The manifest.

    :raises DatasetError: There is none, or it cannot be read.
    """
    file = path / MANIFEST_FILE

    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{path} is not a directory of token shards: it has no {MANIFEST_FILE}. "
            "Build one with `moxe data build`."
        ) from None

    try:
        manifest = _parse_manifest(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as ex:
        raise DatasetError(f"{file} is damaged and cannot be read: {ex}") from ex

    if manifest.format_version != FORMAT_VERSION:
        raise DatasetError(
            f"{file} has format version {manifest.format_version}, but this version "
            f"of moxe_plugin reads {FORMAT_VERSION}. Build the shards again."
        )

    if manifest.dtype not in DTYPES:
        raise DatasetError(
            f"{file} is damaged: `dtype` must be one of {', '.join(DTYPES)}, but is "
            f"{manifest.dtype} instead."
        )

    return manifest


def compute_sha256(file: Path) -> str:
    """Compute the digest of a file.

    :param file: The file.

    :returns: The digest in hexadecimal.
    """
    digest = sha256()

    with file.open("rb") as fp:
        while chunk := fp.read(1 << 20):
            digest.update(chunk)

    return digest.hexdigest()


def _parse_manifest(data: Mapping[str, Any]) -> ShardManifest:
    splits = {}

    for name, split in data["splits"].items():
        shards = [FileInfo(**s) for s in split["shards"]]
        offsets = FileInfo(**split["offsets"])
        splits[name] = SplitInfo(**{**split, "shards": shards, "offsets": offsets})

    return ShardManifest(**{**data, "splits": splits})


def _check_file(path: Path, info: FileInfo, size: int | None, verify: bool) -> None:
    file = path / info.file

    try:
        actual_size = file.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{file} is named in the manifest, but missing.") from None

    if size is not None and actual_size != size:
        raise DatasetError(
            f"{file} is damaged: it must have {size} bytes, but has {actual_size}."
        )

    if verify and compute_sha256(file) != info.sha256:
        raise DatasetError(f"{file} is damaged: its sha256 differs from the manifest.")
