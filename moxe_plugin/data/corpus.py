"""The embedded corpus: English documentation that every installation carries.

Nothing is downloaded. The corpus depends on the installed versions only, so two runs
in one environment see the same tokens; the manifest names the versions.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, Literal, TypeAlias

from fairseq2.logging import log
from filelock import FileLock

from moxe_plugin.console import Stages
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.build import Document, ShardEncoding, build_shards
from moxe_plugin.data.documentation import STDLIB, TOPICS, get_versions
from moxe_plugin.data.gathering import gather
from moxe_plugin.data.manifest import compute_sha256

EmbeddedSize: TypeAlias = Literal["quickstart", "full"]

MANIFEST_FILE: Final = "manifest.json"
FORMAT_VERSION: Final = 2
"""Raised by every change that changes the text."""

# Top-level module -> distribution, in the order they are read.
_PACKAGES: Final = {
    "numpy": "numpy",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "fairseq2": "fairseq2",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "networkx": "networkx",
    "sympy": "sympy",
    "nltk": "nltk",
    "lm_eval": "lm-eval",
    "evaluate": "evaluate",
    "huggingface_hub": "huggingface-hub",
    "fsspec": "fsspec",
    "pyarrow": "pyarrow",
    "rich": "rich",
}


@dataclass(frozen=True, kw_only=True)
class EmbeddedSpec:
    """What an embedded corpus is made of."""

    sources: tuple[str, ...]
    """Top-level modules, or the names of the two parts of the standard library."""

    max_chars: int
    """The size of the text at which to stop reading."""

    vocab_size: int
    """The number of entries of its tokenizer."""

    max_train_questions: int
    """The number of training instructions at most."""

    max_valid_questions: int
    """The number of held-out instructions at most."""


SPECS: Final[Mapping[EmbeddedSize, EmbeddedSpec]] = {
    "quickstart": EmbeddedSpec(
        sources=(TOPICS, STDLIB, "numpy"),
        max_chars=1_650_000,
        vocab_size=2048,
        max_train_questions=4000,
        max_valid_questions=240,
    ),
    "full": EmbeddedSpec(
        sources=(TOPICS, STDLIB, *_PACKAGES),
        max_chars=24_000_000,
        vocab_size=16_384,
        max_train_questions=20_000,
        max_valid_questions=1000,
    ),
}


@dataclass(frozen=True)
class EmbeddedData:
    """A prepared embedded corpus."""

    path: Path
    """The directory of everything below."""

    @property
    def tokenizer_dir(self) -> Path:
        """A Hugging Face tokenizer, trained on the ``train`` split."""
        return self.path / "tokenizer"

    @property
    def tokens_dir(self) -> Path:
        """Token shards with the splits ``train``, ``valid`` and ``test``."""
        return self.path / "tokens"

    @property
    def instructions_dir(self) -> Path:
        """``train.jsonl`` and ``valid.jsonl`` with ``src`` and ``tgt``."""
        return self.path / "instructions"

    @property
    def test_jsonl(self) -> Path:
        """The documents of the ``test`` split, with ``text`` and ``name``."""
        return self.path / "documents" / "test.jsonl"

    def read_manifest(self) -> dict[str, Any]:
        """Read what the corpus was made from and how large it is.

        :returns: The manifest.
        """
        text = self.path.joinpath(MANIFEST_FILE).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)

        return manifest


def get_cache_dir() -> Path:
    """Find the cache directory of this package.

    :returns: ``$MOXE_CACHE_DIR``, else ``$XDG_CACHE_HOME/moxe_plugin``, else
        ``~/.cache/moxe_plugin``.
    """
    if path := os.environ.get("MOXE_CACHE_DIR"):
        return Path(path).expanduser().resolve()

    if path := os.environ.get("XDG_CACHE_HOME"):
        return Path(path, "moxe_plugin")

    return Path.home() / ".cache" / "moxe_plugin"


def prepare_embedded(
    size: EmbeddedSize = "quickstart", cache_dir: Path | None = None
) -> EmbeddedData:
    """Build an embedded corpus in the cache, or find the one there.

    Several processes may call this at once: one builds, the others wait.

    :param size: ``quickstart`` (some 450,000 tokens) or ``full`` (some 5 million).
    :param cache_dir: The cache directory; ``None`` means :func:`get_cache_dir`.

    :returns: Where the parts are.

    :raises ValueError: ``size`` is not known.
    """
    if size not in SPECS:
        raise ValueError(f"`size` must be one of {', '.join(SPECS)}, but is {size}.")

    root = (cache_dir if cache_dir is not None else get_cache_dir()) / "embedded"

    return prepare_corpus(size, SPECS[size], root)


def prepare_corpus(name: str, spec: EmbeddedSpec, root: Path) -> EmbeddedData:
    """Build the corpus of a specification below ``root``, or find it there.

    :param name: Begins the name of the directory.
    :param spec: What the corpus is made of.
    :param root: The directory to look in.

    :returns: Where the parts are.
    """
    origin = _describe_origin(spec)
    key = sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    data = EmbeddedData(root / f"{name}-{key}")

    if _is_complete(data):
        return data

    root.mkdir(parents=True, exist_ok=True)

    with FileLock(root / f"{data.path.name}.lock"):
        if _is_complete(data):
            return data

        if data.path.exists():
            log.warning("{} is incomplete or damaged. Building it again.", data.path)
            shutil.rmtree(data.path)

        log.info("Building the embedded {} corpus in {}, once.", name, data.path)

        tmp_path = Path(mkdtemp(prefix=f".{data.path.name}.", dir=root))

        try:
            _build(spec, origin, EmbeddedData(tmp_path))
            tmp_path.chmod(0o755)
            tmp_path.rename(data.path)
        finally:
            shutil.rmtree(tmp_path, ignore_errors=True)

    return data


def _describe_origin(spec: EmbeddedSpec) -> dict[str, Any]:
    packages = [_PACKAGES[s] for s in spec.sources if s in _PACKAGES]

    return {
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "packages": get_versions([*packages, "tokenizers"]),
        "spec": asdict(spec),
    }


def _is_complete(data: EmbeddedData) -> bool:
    try:
        files = data.read_manifest()["files"]
    except (FileNotFoundError, ValueError, KeyError):
        return False

    for name, info in files.items():
        file = data.path / name

        if not file.is_file() or file.stat().st_size != info["num_bytes"]:
            return False

    return True


def _build(spec: EmbeddedSpec, origin: dict[str, Any], data: EmbeddedData) -> None:
    with Stages() as stages:
        corpus = gather(spec.sources, spec.max_chars, stages)

        corpus.write_documents(data.path / "documents")

        num_questions = corpus.questions.write(
            data.instructions_dir,
            corpus.cleaner,
            spec.max_train_questions,
            spec.max_valid_questions,
        )

        train = [d.text for d in corpus.documents if d.split == "train"]

        with stages.start("Training the tokenizer"):
            train_bpe(train, spec.vocab_size, data.tokenizer_dir)

        with stages.start("Writing token shards", len(corpus.documents)) as step:
            shards = build_shards(
                step.over(Document(d.split, d.text) for d in corpus.documents),
                data.tokens_dir,
                ShardEncoding(
                    tokenizer_path=data.tokenizer_dir, tokenizer_name="embedded"
                ),
                source="documentation of " + ", ".join(spec.sources),
            )

    files = sorted(f for f in data.path.rglob("*") if f.is_file())

    manifest = {
        **origin,
        "num_chars": corpus.num_chars,
        "num_tokens": {name: s.num_tokens for name, s in shards.splits.items()},
        "num_documents": {name: s.num_documents for name, s in shards.splits.items()},
        "num_instructions": num_questions,
        "files": {
            str(f.relative_to(data.path)): {
                "num_bytes": f.stat().st_size,
                "sha256": compute_sha256(f),
            }
            for f in files
        },
    }

    data.path.joinpath(MANIFEST_FILE).write_text(
        json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
    )
