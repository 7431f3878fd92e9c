"""The tokenizer family ``moxe_hg``: any Hugging Face tokenizer, with encode modes.

fairseq2's own ``hg`` family ignores the mode, never adds BOS or EOS and counts the
vocabulary without added tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from fairseq2.data.tokenizers import (
    TokenDecoder,
    TokenEncoder,
    Tokenizer,
    TokenizerModelError,
    VocabularyInfo,
)
from fairseq2.data.tokenizers.hg import (
    HuggingFaceTokenDecoder,
    HuggingFaceTokenEncoder,
    HuggingFaceTokenModel,
)
from fairseq2.device import Device
from fairseq2.error import NotSupportedError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typing_extensions import override

from moxe_plugin.data.manifest import compute_sha256

MOXE_HG_TOKENIZER_FAMILY: Final = "moxe_hg"
TOKENIZER_FILE: Final = "tokenizer.json"


@dataclass(kw_only=True)
class HgTextTokenizerConfig:
    """Which special tokens to use; ``None`` means the one the tokenizer names.

    SmolLM's instruction-tuned tokenizer, say, names ``<|im_start|>`` and
    ``<|im_end|>``; the base models use ``<|endoftext|>`` for all.
    """

    bos_token: str | None = None
    """The token that begins a sequence."""

    eos_token: str | None = None
    """The token that ends a sequence."""

    pad_token: str | None = None
    """The token that fills a batch."""


@final
class HgTextTokenizer(Tokenizer):
    """A Hugging Face tokenizer with the encode modes of fairseq2's LLaMA tokenizers.

    ===================  =====  =====
    mode                 BOS    EOS
    ===================  =====  =====
    ``default``, None    yes    yes
    ``prompt``           yes    no
    ``prompt_response``  no     yes
    ``as_is``            no     no
    ===================  =====  =====

    A tokenizer without BOS begins with nothing.

    :param hg_tokenizer: The tokenizer.
    :param vocab_info: Its size, added tokens included, and special tokens.
    :param file: Its ``tokenizer.json``.
    """

    def __init__(
        self,
        hg_tokenizer: PreTrainedTokenizerFast,
        vocab_info: VocabularyInfo,
        file: Path,
    ) -> None:
        self._hg_tokenizer = hg_tokenizer
        self._vocab_info = vocab_info
        self._file = file
        self._sha256 = compute_sha256(file)
        self._model = HuggingFaceTokenModel(hg_tokenizer, vocab_info)  # type: ignore[call-arg]  # declared without its constructor

    @override
    def create_encoder(
        self,
        *,
        task: str | None = None,
        lang: str | None = None,
        mode: str | None = None,
        device: Device | None = None,
        pin_memory: bool = False,
    ) -> TokenEncoder:
        if task is not None:
            raise ValueError(f"`task` must be `None`, but is '{task}' instead.")

        if lang is not None:
            raise ValueError(f"`lang` must be `None`, but is '{lang}' instead.")

        bos = self._tokens(self._vocab_info.bos_idx)
        eos = self._tokens(self._vocab_info.eos_idx)

        match mode:
            case None | "default":
                prefix, suffix = bos, eos
            case "prompt":
                prefix, suffix = bos, []
            case "prompt_response":
                prefix, suffix = [], eos
            case "as_is":
                prefix, suffix = [], []
            case _:
                raise NotSupportedError(
                    f"`mode` must be a supported mode, but is {mode} instead. "
                    "Supported modes are default, prompt, prompt_response, as_is."
                )

        return HuggingFaceTokenEncoder(
            self._model,
            prefix_tokens=prefix,
            suffix_tokens=suffix,
            device=device,
            pin_memory=pin_memory,
        )

    def _tokens(self, idx: int | None) -> list[str]:
        return [] if idx is None else self._model.convert_ids_to_tokens([idx])

    @override
    def create_raw_encoder(
        self, *, device: Device | None = None, pin_memory: bool = False
    ) -> TokenEncoder:
        return HuggingFaceTokenEncoder(
            self._model, device=device, pin_memory=pin_memory
        )

    @override
    def create_decoder(self, *, skip_special_tokens: bool = False) -> TokenDecoder:
        return HuggingFaceTokenDecoder(
            self._model, skip_special_tokens=skip_special_tokens
        )

    @property
    @override
    def vocab_info(self) -> VocabularyInfo:
        return self._vocab_info

    @property
    def hg_tokenizer(self) -> PreTrainedTokenizerFast:
        """The Hugging Face tokenizer."""
        return self._hg_tokenizer

    @property
    def file(self) -> Path:
        """The ``tokenizer.json`` that it was read from."""
        return self._file

    @property
    def sha256(self) -> str:
        """The digest of ``tokenizer.json``; token shards name it."""
        return self._sha256


def load_hg_text_tokenizer(
    path: Path, config: HgTextTokenizerConfig
) -> HgTextTokenizer:
    """Load a Hugging Face tokenizer from disk.

    :param path: A directory with ``tokenizer.json``, or such a file.
    :param config: Which special tokens to use.

    :returns: The tokenizer.

    :raises TokenizerModelError: It cannot be read, or lacks a special token.
    :raises FileNotFoundError: There is no tokenizer at ``path``.
    """
    file = find_tokenizer_file(path)
    hg_tokenizer = _load(file)
    vocab = hg_tokenizer.get_vocab()

    def get_idx(role: str, token: str | None) -> int | None:
        if token is None:
            token = getattr(hg_tokenizer, f"{role}_token")

        if token is None:
            return None

        if token not in vocab:
            msg = f"`{role}_token` must be in the vocabulary of {path}, but is {token}."

            raise TokenizerModelError(path, msg)

        return int(vocab[token])

    vocab_info = VocabularyInfo(
        # Not `vocab_size`, which leaves out added tokens; ids may have gaps.
        size=max(vocab.values()) + 1,
        unk_idx=get_idx("unk", None),
        bos_idx=get_idx("bos", config.bos_token),
        eos_idx=get_idx("eos", config.eos_token),
        pad_idx=get_idx("pad", config.pad_token),
    )

    return HgTextTokenizer(hg_tokenizer, vocab_info, file)


def find_tokenizer_file(path: Path) -> Path:
    """Find the ``tokenizer.json`` of a tokenizer.

    :param path: A directory that holds the file, or the file.

    :returns: The file.

    :raises FileNotFoundError: There is none.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path

    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {TOKENIZER_FILE}. Name a Hugging Face tokenizer; `moxe "
            "data tokenizer` trains one."
            if path.is_dir()
            else f"The tokenizer {path} does not exist."
        )

    return file


def _load(file: Path) -> PreTrainedTokenizerFast:
    tokenizer: Any

    try:
        if file.with_name("tokenizer_config.json").exists():
            load: Any = AutoTokenizer.from_pretrained
            # Without an answer, transformers would ask whether to run code in there.
            tokenizer = load(
                file.parent, local_files_only=True, trust_remote_code=False
            )
        else:
            load = PreTrainedTokenizerFast
            tokenizer = load(tokenizer_file=str(file))
    # `tokenizers` raises plain `Exception` for a file it cannot parse.
    except Exception as ex:
        msg = f"{file} is not a valid Hugging Face tokenizer: {ex}"

        raise TokenizerModelError(file, msg) from ex

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerModelError(file, f"{file} is not a fast tokenizer.")

    return tokenizer
