"""Configuration and named architectures of Gemma 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.models.validation import check_counts, check_vocabulary

GEMMA2_FAMILY: Final = "gemma2"


@dataclass(kw_only=True)
class Gemma2Config(Validatable):
    """Holds the configuration of a Gemma 2 model.

    The default values are those of the MoxE paper's Table 1 (356M). What is no field
    here has the value that transformers gives to Gemma 2: both softcappings, the
    initial standard deviation 0.02, rotary positions, tied embeddings.
    """

    vocab_size: int = 49_152
    """The size of the vocabulary."""

    pad_idx: int | None = None
    """The id of the padding token; ``None`` if the vocabulary has none."""

    max_seq_len: int = 256
    """The maximum length of a sequence in tokens."""

    model_dim: int = 640
    """The dimensionality of the residual stream."""

    num_layers: int = 15
    """The number of decoder layers; every other one, from the first, has a window."""

    num_heads: int = 8
    """The number of attention heads."""

    num_key_value_heads: int = 4
    """The number of key and value heads."""

    head_dim: int = 256
    """The dimensionality of an attention head."""

    ffn_inner_dim: int = 9_216
    """The inner dimensionality of feed-forward networks."""

    sliding_window: int = 4_096
    """How many tokens, itself included, a token sees in a layer with a window."""

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        check_vocabulary(self, result)

        check_counts(
            self, ["max_seq_len", "model_dim", "num_layers", "ffn_inner_dim"], result
        )

        kv_heads = self.num_key_value_heads

        if kv_heads < 1 or self.num_heads < 1 or self.num_heads % kv_heads:
            result.add_error(
                f"`num_heads` ({self.num_heads}) must be a multiple of "
                f"`num_key_value_heads`, but that is {kv_heads}."
            )

        if self.head_dim < 2 or self.head_dim % 2 != 0:
            result.add_error(
                "`head_dim` must be even for rotary positions, but is "
                f"{self.head_dim} instead."
            )

        if self.sliding_window < 2:
            result.add_error(
                "`sliding_window` must be greater than or equal to 2, but is "
                f"{self.sliding_window} instead."
            )

        return result


def register_gemma2_configs(container: DependencyContainer) -> None:
    """Register the named architectures of Gemma 2.

    :param container: fairseq2's dependency container.
    """
    arch = ConfigRegistrar(container, Gemma2Config)

    @arch("356m")
    def _356m() -> Gemma2Config:
        return Gemma2Config()

    @arch("small")
    def _small() -> Gemma2Config:
        return Gemma2Config(
            vocab_size=4_096,
            pad_idx=1,
            model_dim=128,
            num_layers=3,
            num_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            ffn_inner_dim=1_984,
        )

    @arch("quickstart")
    def _quickstart() -> Gemma2Config:
        return Gemma2Config(
            vocab_size=2_048,
            pad_idx=1,
            model_dim=96,
            num_layers=4,
            num_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            ffn_inner_dim=1_216,
        )

    @arch("tiny")
    def _tiny() -> Gemma2Config:
        return Gemma2Config(
            vocab_size=320,
            max_seq_len=64,
            model_dim=32,
            num_layers=3,
            num_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            ffn_inner_dim=64,
            sliding_window=8,
        )
