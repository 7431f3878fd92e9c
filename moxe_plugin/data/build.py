"""Encodes documents and writes them as token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from fairseq2.datasets import DatasetError
from tokenizers import Tokenizer

from moxe_plugin.data.manifest import ShardManifest, compute_sha256
from moxe_plugin.data.shard_writer import ShardWriter
from moxe_plugin.data.tokenizer import (
    HgTextTokenizerConfig,
    find_tokenizer_file,
    load_hg_text_tokenizer,
)

ENCODE_BATCH_SIZE: Final = 256

T = TypeVar("T")


class Document(NamedTuple):
    """A text and the split it belongs to."""

    split: str
    """The name of the split."""

    text: str
    """The text."""


def build_shards(
    documents: Iterable[Document],
    output_dir: Path,
    *,
    tokenizer_path: Path,
    eos_token: str | None = None,
    tokenizer_name: str | None = None,
    source: str,
    max_tokens: int | None = None,
    overwrite: bool = False,
) -> ShardManifest:
    """Encode documents and write them as token shards.

    A special token that is spelt out in a document is encoded as the text it is, so
    that no document can end another.

    :param documents: The documents.
    :param output_dir: The directory to make.
    :param tokenizer_path: A Hugging Face tokenizer on disk.
    :param eos_token: The token that separates documents, if not the tokenizer's EOS.
    :param tokenizer_name: What the manifest calls the tokenizer; ``None`` means its
        path.
    :param source: Where the documents came from.
    :param max_tokens: The number of tokens of all splits after which to stop.
    :param overwrite: Whether an existing directory is replaced.

    :returns: The manifest.

    :raises DatasetError: The tokenizer has no EOS, or no document has text.
    :raises FileExistsError: The directory exists and ``overwrite`` is ``False``.
    """
    config = HgTextTokenizerConfig(eos_token=eos_token)

    vocab_info = load_hg_text_tokenizer(tokenizer_path, config).vocab_info

    if vocab_info.eos_idx is None:
        raise DatasetError(
            f"{tokenizer_path} has no EOS token to separate documents with. Name one."
        )

    file = find_tokenizer_file(tokenizer_path)

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    with ShardWriter(
        output_dir,
        tokenizer_name=tokenizer_name or str(tokenizer_path),
        tokenizer_sha256=compute_sha256(file),
        vocab_size=vocab_info.size,
        eos_idx=vocab_info.eos_idx,
        source=source,
        overwrite=overwrite,
    ) as writer:
        _write_documents(writer, documents, tokenizer, max_tokens)

    return writer.manifest


def _write_documents(
    writer: ShardWriter,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    max_tokens: int | None,
) -> None:
    num_tokens = 0

    for batch in _batched(documents, ENCODE_BATCH_SIZE):
        encodings = tokenizer.encode_batch(
            [d.text for d in batch], add_special_tokens=False
        )

        for document, encoding in zip(batch, encodings, strict=True):
            if not encoding.ids:
                continue

            writer.add_document(
                document.split, encoding.ids, len(document.text.encode())
            )

            # Each document ends with the token that separates them.
            num_tokens += len(encoding.ids) + 1

            if max_tokens is not None and num_tokens >= max_tokens:
                return


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)

    while batch := list(islice(iterator, size)):
        yield batch
