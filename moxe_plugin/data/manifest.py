"""The manifest of a directory of token shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from fairseq2.datasets import DatasetError

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

    def __post_init__(self) -> None:
        """Check that the file lies in the directory.

        :raises ValueError: Its name leads elsewhere.
        """
        if Path(self.file).name != self.file:
            raise ValueError(
                "`file` must be the name of a file in the directory, but is "
                f"'{self.file}' instead."
            )


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


def read_manifest(path: Path) -> ShardManifest:
    """Read the manifest of a shard directory.

    :param path: The directory.

    :returns: The manifest.

    :raises DatasetError: There is none, or it cannot be read.
    """
    file = path / MANIFEST_FILE

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as ex:
        raise DatasetError(
            f"{file} is damaged: it is not UTF-8 ({ex.reason})."
        ) from None
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
