"""Writes a directory of token shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any, Final

from fairseq2.datasets import DatasetError
from typing_extensions import Self

from moxe_plugin.data.manifest import MANIFEST_FILE, ShardManifest
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.split_writer import SplitWriter

MAX_SHARD_TOKENS: Final = 1 << 27


class ShardWriter:
    """Writes token shards next to their destination and moves them there at the end.

    A context manager: leaving it normally publishes the directory at once, leaving it
    by an exception removes what was written. With a ``work_path``, an exception that
    does not tell of the documents (a lost connection, a full disk) leaves it there for
    a later writer that is given the state of the last :meth:`sync`.

    :param path: The directory to make.
    :param tokenizer_name: Where the tokenizer came from.
    :param tokenizer_sha256: The digest of its ``tokenizer.json``.
    :param vocab_size: The size of its vocabulary, added tokens included.
    :param eos_idx: The id that separates documents.
    :param source: Where the text came from.
    :param overwrite: Whether an existing directory is replaced.
    :param max_shard_tokens: The size at which the next shard of a split begins.
    :param work_path: The directory to write in until all is written, on the file system
        of ``path``; ``None`` means one of the writer's own.
    :param state: The state of the writer to continue, in its ``work_path``.

    :raises FileExistsError: ``path`` exists and ``overwrite`` is ``False``.
    :raises DatasetError: What the earlier writer wrote is damaged.
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
        work_path: Path | None = None,
        state: Mapping[str, Any] | None = None,
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
        self._splits: dict[str, SplitWriter] = {}
        self._manifest = ShardManifest(
            tokenizer_name=tokenizer_name,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            eos_idx=eos_idx,
            dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
            source=source,
        )

        self._can_continue = work_path is not None

        if work_path is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            work_path = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))

        self._work_path = work_path
        self._shards_path = work_path / "shards"
        self._shards_path.mkdir(exist_ok=True)

        if state is not None:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, split_state in state.items():
            self._splits[name] = self._create_split(name, split_state)

        # What was begun after the last `sync`.
        known = {f for s in self._splits.values() for f in s.files}

        for file in [*self._shards_path.iterdir(), *self._work_path.glob("*.offsets")]:
            if file not in known:
                file.unlink()

    def _create_split(
        self, name: str, state: Mapping[str, Any] | None = None
    ) -> SplitWriter:
        offsets_file = self._work_path / f"{name}.offsets"

        return SplitWriter(
            self._shards_path,
            name,
            self._manifest,
            self._max_shard_tokens,
            offsets_file,
            state,
        )

    def add_document(self, split: str, tokens: Sequence[int], num_bytes: int) -> None:
        """Append a document to a split.

        :param split: The name of the split; it begins with its first document.
        :param tokens: Token ids, without separators.
        :param num_bytes: The size of the document as UTF-8 text.

        :raises ValueError: A token is not in the vocabulary.
        """
        writer = self._splits.get(split)

        if writer is None:
            writer = self._create_split(split)
            self._splits[split] = writer

        writer.add_document(tokens, num_bytes)

    def sync(self) -> dict[str, Any]:
        """Bring every document added so far to the disk.

        :returns: The state that another writer can continue from, as JSON can hold it.
        """
        return {name: writer.sync() for name, writer in self._splits.items()}

    @property
    def num_document_tokens(self) -> int:
        """The number of tokens of all documents, each with its separator."""
        return sum(w.num_tokens - 1 for w in self._splits.values())

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

        self._manifest.write(self._shards_path)
        open_shards(self._shards_path, verify=True)

        # mkdtemp makes private directories.
        self._shards_path.chmod(0o755)

        if self._path.exists():
            replaced = self._work_path / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            self._path.rename(replaced)

        self._shards_path.rename(self._path)

        shutil.rmtree(self._work_path)

        return self._manifest

    @property
    def manifest(self) -> ShardManifest:
        """The manifest, complete once the writer is closed."""
        return self._manifest

    def discard(self) -> None:
        """Remove what was written."""
        self.abandon()

        shutil.rmtree(self._work_path)

    def abandon(self) -> None:
        """Stop writing, but leave what was written."""
        for writer in self._splits.values():
            writer.abandon()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Publish the directory, or discard or leave it if there was an exception."""
        if kls is None:
            self.close()
        elif self._can_continue and not issubclass(kls, (DatasetError, ValueError)):
            self.abandon()
        else:
            self.discard()
