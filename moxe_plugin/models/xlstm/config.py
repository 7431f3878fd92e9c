"""Configuration and named architectures of the xLSTM baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.models.validation import (
    check_choices,
    check_counts,
    check_factors,
    check_vocabulary,
)
from moxe_plugin.nn.layers import round_up_to_64

XLSTM_FAMILY: Final = "xlstm"


@dataclass(kw_only=True)
class XLSTMConfig(Validatable):
    """Holds the configuration of an xLSTM language model (arXiv 2405.04517).

    The default values are those of xLSTM[5:1] in MoxE's Table 1 (338M).
    """

    vocab_size: int = 49_152
    """The size of the vocabulary."""

    pad_idx: int | None = None
    """The id of the padding token; ``None`` if the vocabulary has none."""

    max_seq_len: int = 256
    """The context length in tokens; generators stop there, the model could go on."""

    model_dim: int = 1024
    """The dimensionality of the residual stream."""

    num_blocks: int = 36
    """The number of xLSTM blocks."""

    slstm_period: int = 6
    """Every how many blocks one is an sLSTM block, the first of each group; the others
    are mLSTM blocks. 6 means [5:1]."""

    num_heads: int = 8
    """The number of heads of every block."""

    qkv_block_size: int = 32
    """The block size of the mLSTM's block-diagonal q, k and v projections."""

    conv_kernel_size: int = 4
    """The width of the causal convolution of every block, in tokens."""

    mlstm_proj_factor: float = 2.0
    """The mLSTM's inner dimension over ``model_dim``, before rounding up to 64."""

    slstm_ffn_proj_factor: float = 1.7
    """The sLSTM block's feed-forward dimension over ``model_dim``, rounded likewise."""

    backend: Literal["auto", "torch", "native", "triton"] = "auto"
    """What computes the sLSTM's loop over time: ``native`` is C++ for CPUs, ``triton``
    kernels for GPUs, which in training are those of whole blocks; ``auto`` takes the
    one or the other where it can run, else ``torch``."""

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        check_choices(self, result)

        check_vocabulary(self, result)

        counts = ["max_seq_len", "model_dim", "num_blocks", "slstm_period"]

        check_counts(self, [*counts, "conv_kernel_size"], result)

        if self.num_heads < 1 or self.model_dim % self.num_heads != 0:
            result.add_error(
                f"`model_dim` ({self.model_dim}) must be a multiple of `num_heads`, "
                f"but `num_heads` is {self.num_heads}."
            )

        factors = ["mlstm_proj_factor", "slstm_ffn_proj_factor"]

        if not check_factors(self, factors, self.model_dim, result):
            return result

        inner_dim = round_up_to_64(self.mlstm_proj_factor * self.model_dim)

        for name in ("num_heads", "qkv_block_size"):
            value = getattr(self, name)

            if value < 1 or inner_dim % value != 0:
                result.add_error(
                    f"`{name}` must divide the mLSTM's inner dimension ({inner_dim}: "
                    "`mlstm_proj_factor` * `model_dim`, rounded up to a multiple of "
                    f"64), but is {value} instead."
                )

        return result


def register_xlstm_configs(container: DependencyContainer) -> None:
    """Register the named architectures with fairseq2."""
    arch = ConfigRegistrar(container, XLSTMConfig)

    @arch("338m")
    def _338m() -> XLSTMConfig:
        return XLSTMConfig()

    @arch("small")
    def _small() -> XLSTMConfig:
        return XLSTMConfig(
            vocab_size=4096, pad_idx=1, model_dim=184, num_blocks=6, num_heads=4
        )

    @arch("quickstart")
    def _quickstart() -> XLSTMConfig:
        return XLSTMConfig(
            vocab_size=2048,
            pad_idx=1,
            model_dim=160,
            num_blocks=6,
            num_heads=4,
            slstm_ffn_proj_factor=2.4,
        )

    @arch("tiny")
    def _tiny() -> XLSTMConfig:
        return XLSTMConfig(
            vocab_size=320,
            max_seq_len=64,
            model_dim=32,
            num_blocks=3,
            slstm_period=3,
            num_heads=2,
        )
