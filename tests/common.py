"""What several test modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import torch
from fairseq2.data.tokenizers import (
    TokenDecoder,
    TokenEncoder,
    Tokenizer,
    VocabularyInfo,
)
from torch import Tensor
from typing_extensions import override

BOS_IDX: Final = 256
EOS_IDX: Final = 257
PAD_IDX: Final = 258
VOCAB_SIZE: Final = 320
"""As the ``tiny`` architectures have it; ids from 259 on are never produced."""


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Check that two tensors have the same shape, type and, nearly, values.

    :param actual: What the code computed.
    :param expected: What it must be.
    :param rtol: The relative tolerance; torch's for the type by default.
    :param atol: The absolute tolerance; torch's for the type by default.
    """
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@final
class ByteTokenizer(Tokenizer):
    """Has one token per byte of UTF-8, and fairseq2's encoding modes."""

    @override
    def create_encoder(
        self,
        *,
        task: str | None = None,
        lang: str | None = None,
        mode: str | None = None,
        device: torch.device | None = None,
        pin_memory: bool = False,
    ) -> TokenEncoder:
        prefix, suffix = _MODES["default" if mode is None else mode]

        return _ByteEncoder(prefix, suffix, device)

    @override
    def create_raw_encoder(
        self, *, device: torch.device | None = None, pin_memory: bool = False
    ) -> TokenEncoder:
        return _ByteEncoder((), (), device)

    @override
    def create_decoder(self, *, skip_special_tokens: bool = False) -> TokenDecoder:
        return _ByteDecoder()

    @property
    @override
    def vocab_info(self) -> VocabularyInfo:
        return VocabularyInfo(VOCAB_SIZE, None, BOS_IDX, EOS_IDX, PAD_IDX)


_MODES: Final[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "default": ((BOS_IDX,), (EOS_IDX,)),
    "prompt": ((BOS_IDX,), ()),
    "prompt_response": ((), (EOS_IDX,)),
    "as_is": ((), ()),
}


@final
class _ByteEncoder(TokenEncoder):
    def __init__(
        self,
        prefix: tuple[int, ...],
        suffix: tuple[int, ...],
        device: torch.device | None,
    ) -> None:
        self._prefix = prefix
        self._suffix = suffix
        self._device = device

    @override
    def __call__(self, text: str) -> Tensor:
        ids = [*self._prefix, *text.encode(), *self._suffix]

        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    @override
    def encode_as_tokens(self, text: str) -> list[str]:
        return [_token(i) for i in self(text).tolist()]

    @property
    @override
    def prefix_indices(self) -> Tensor | None:
        return torch.tensor(self._prefix, dtype=torch.int64) if self._prefix else None

    @property
    @override
    def suffix_indices(self) -> Tensor | None:
        return torch.tensor(self._suffix, dtype=torch.int64) if self._suffix else None


@final
class _ByteDecoder(TokenDecoder):
    @override
    def __call__(self, token_indices: Tensor) -> str:
        ids = [i for i in token_indices.tolist() if i < BOS_IDX]

        return bytes(ids).decode(errors="replace")

    @override
    def decode_from_tokens(self, tokens: Sequence[str]) -> str:
        ids = [int(t, 16) for t in tokens if not t.startswith("<")]

        return bytes(ids).decode(errors="replace")


def _token(idx: int) -> str:
    return f"{idx:02x}" if idx < BOS_IDX else f"<{idx}>"
