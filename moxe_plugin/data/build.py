"""Encodes documents and writes them as token shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypedDict, TypeVar

from fairseq2.datasets import DatasetError
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from moxe_plugin.data.journal import BuildJournal
from moxe_plugin.data.manifest import ShardManifest, compute_sha256
from moxe_plugin.data.shard_writer import ShardWriter
from moxe_plugin.data.tokenizer import (
    HgTextTokenizerConfig,
    find_tokenizer_file,
    load_hg_text_tokenizer,
)

ENCODE_BATCH_SIZE: Final = 256

SYNC_INTERVAL_S: Final = 10.0
"""The time after which to note where a build stands; as much is done again after an
interruption."""

T = TypeVar("T")


class Document(NamedTuple):
    """A text and the split it belongs to."""

    split: str
    """The name of the split."""

    text: str
    """The text."""


class ResumableDocuments(Protocol):
    """Documents in an order that does not change, and how many of them were read."""

    def __iter__(self) -> Iterator[Document]:
        """Read on from where reading stopped."""

    def state_dict(self) -> dict[str, Any]:
        """Tell where reading stopped.

        :returns: The state, as JSON can hold it.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another reading of the same documents stopped.

        :param state: Its state.
        """

    def describe(self) -> dict[str, Any]:
        """Tell what is read; it differs when the documents may differ.

        :returns: The description, as JSON can hold it.
        """


class _ManifestArgs(TypedDict):
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eos_idx: int


@dataclass(frozen=True, kw_only=True)
class ShardEncoding:
    """How documents become tokens."""

    tokenizer_path: Path
    """A Hugging Face tokenizer on disk."""

    eos_token: str | None = None
    """The token that separates documents, if not the tokenizer's EOS."""

    tokenizer_name: str | None = None
    """What the manifest calls the tokenizer; ``None`` means its path."""

    max_tokens: int | None = None
    """The number of tokens of all splits, separators included, with which to stop; the
    last document is taken whole."""


def build_shards(
    documents: Iterable[Document],
    output_dir: Path,
    encoding: ShardEncoding,
    *,
    source: str,
) -> ShardManifest:
    """Encode documents and write them as token shards.

    A special token that is spelt out in a document is encoded as the text it is, so
    that no document can end another.

    :param documents: The documents.
    :param output_dir: The directory to make.
    :param encoding: How to encode them.
    :param source: Where the documents came from.

    :returns: The manifest.

    :raises DatasetError: The tokenizer has no EOS, or no document has text.
    :raises FileExistsError: The directory exists.
    """
    encoder = _Encoder(encoding)

    with ShardWriter(output_dir, source=source, **encoder.manifest_args) as writer:
        encoder.write(documents, writer)

    return writer.manifest


def build_shards_resumably(
    stream: ResumableDocuments,
    output_dir: Path,
    encoding: ShardEncoding,
    *,
    source: str,
    overwrite: bool = False,
    restart: bool = False,
    notify: Callable[[str], None],
    progress: Callable[[int], None],
) -> ShardManifest:
    """Do as :func:`build_shards`, but go on where an interrupted build stopped.

    The result is, byte for byte, that of a build that was not interrupted.

    :param stream: The documents.
    :param output_dir: The directory to make.
    :param encoding: How to encode them.
    :param source: Where the documents came from.
    :param overwrite: Whether an existing directory is replaced.
    :param restart: Whether an interrupted build is dropped.
    :param notify: Told if a build is continued.
    :param progress: Told the number of documents written since it was told last.

    :returns: The manifest.

    :raises DatasetError: The tokenizer has no EOS, no document has text, or another
        process builds the same.
    :raises FileExistsError: The directory exists and ``overwrite`` is ``False``.
    :raises ValueError: An interrupted build was asked for something else.
    """
    encoder = _Encoder(encoding)

    request = {
        **encoder.describe(),
        **stream.describe(),
        "max_tokens": encoding.max_tokens,
        "tokenizers": tokenizers_version,
    }

    with BuildJournal(output_dir, request, restart=restart) as journal:
        state = journal.read()

        with ShardWriter(
            output_dir,
            source=source,
            overwrite=overwrite,
            work_path=journal.path,
            state=state["shards"] if state is not None else None,
            **encoder.manifest_args,
        ) as writer:
            if state is not None:
                stream.load_state_dict(state["documents"])
                notify(
                    f"Continuing the interrupted build of {output_dir}, which has "
                    f"{writer.num_document_tokens:,} tokens."
                )

            last_sync = time.monotonic()

            def on_batch(num_documents: int) -> None:
                nonlocal last_sync

                progress(num_documents)

                if time.monotonic() - last_sync >= SYNC_INTERVAL_S:
                    journal.write(
                        {"shards": writer.sync(), "documents": stream.state_dict()}
                    )
                    last_sync = time.monotonic()

            encoder.write(stream, writer, on_batch)

    return writer.manifest


class _Encoder:
    def __init__(self, encoding: ShardEncoding) -> None:
        path = encoding.tokenizer_path
        config = HgTextTokenizerConfig(eos_token=encoding.eos_token)
        vocab_info = load_hg_text_tokenizer(path, config).vocab_info

        if vocab_info.eos_idx is None:
            raise DatasetError(
                f"{path} has no EOS token to separate documents with. Name one with "
                "`--eos-token`."
            )

        file = find_tokenizer_file(path)

        self._max_tokens = encoding.max_tokens
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        self.manifest_args: _ManifestArgs = {
            "tokenizer_name": encoding.tokenizer_name or str(path),
            "tokenizer_sha256": compute_sha256(file),
            "vocab_size": vocab_info.size,
            "eos_idx": vocab_info.eos_idx,
        }

    def describe(self) -> dict[str, Any]:
        return dict(self.manifest_args)

    def write(
        self,
        documents: Iterable[Document],
        writer: ShardWriter,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if self._is_full(writer):
            return

        for batch in _batched(documents, ENCODE_BATCH_SIZE):
            encodings = self._tokenizer.encode_batch(
                [d.text for d in batch], add_special_tokens=False
            )

            for document, encoding in zip(batch, encodings, strict=True):
                if not encoding.ids:
                    continue

                writer.add_document(
                    document.split, encoding.ids, len(document.text.encode())
                )

                if self._is_full(writer):
                    return

            if on_batch is not None:
                on_batch(len(batch))

    def _is_full(self, writer: ShardWriter) -> bool:
        return (
            self._max_tokens is not None
            and writer.num_document_tokens >= self._max_tokens
        )


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)

    while batch := list(islice(iterator, size)):
        yield batch
