"""Configuration of MoxE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.nn.layers import round_up_to_64

MOXE_FAMILY: Final = "moxe"


@dataclass(kw_only=True)
class MoxEConfig(Validatable):
    """Holds the configuration of a MoxE model.

    The default values are those of the paper's Table 1 (340M) and, where the paper is
    silent, of the authors' training configuration (see the README's list of choices).
    """

    vocab_size: int = 49_152
    """The size of the vocabulary."""

    pad_idx: int | None = None
    """The id of the padding token; ``None`` if the vocabulary has none."""

    max_seq_len: int = 256
    """The context length in tokens; generators stop there, the model could go on."""

    model_dim: int = 640
    """The dimensionality of the residual stream."""

    num_layers: int = 10
    """The number of decoder layers: mixer, router and experts each."""

    num_heads: int = 4
    """The number of heads of every xLSTM block."""

    mixer_blocks: list[Literal["slstm", "mlstm"]] = field(
        default_factory=lambda: ["slstm", "mlstm"]
    )
    """The blocks of the sequence mixer in order: MoxE eq. (4)."""

    experts: Literal["xlstm", "ffn"] = "xlstm"
    """What an expert is: an xLSTM block, or (ablation) a feed-forward network without
    norm and residual."""

    expert_state: Literal["subsequence", "token", "dense"] = "subsequence"
    """What an expert remembers: the tokens routed to it (``subsequence``), nothing
    (``token``, the authors' code), or every token (``dense``, at E/K of the cost)."""

    num_experts: int = 8
    """The number of experts of a layer."""

    num_mlstm_experts: int | None = None
    """How many of them, the first ones, form the mLSTM group; ``None`` means half."""

    top_k: int = 2
    """The number of experts chosen for a token: MoxE eq. (3)."""

    router: Literal["difficulty", "standard"] = "difficulty"
    """Whether a token's difficulty biases the router's logits: eqs. (5)-(7)."""

    modulation: Literal["standard", "masked", "proportional"] = "standard"
    """How the difficulty d becomes a bias, with the scale gamma and the threshold tau:
    ``gamma * d``, ``gamma * d * 1[d > tau]`` or ``gamma * relu(d - tau)``."""

    difficulty_bias_scale: float = 0.3
    """The scale gamma of eq. (6)."""

    difficulty_threshold: float = 0.8
    """The threshold tau of the ``masked`` and ``proportional`` modulations."""

    router_bias: bool = True
    """Whether the router's projection has a bias, as in the paper's count of
    parameters."""

    qkv_block_size: int = 32
    """The block size of the mLSTM's block-diagonal q, k and v projections."""

    conv_kernel_size: int = 4
    """The width of the causal convolution of every xLSTM block, in tokens."""

    mlstm_proj_factor: float = 2.0
    """The mLSTM's inner dimension over ``model_dim``, before rounding up to 64."""

    slstm_ffn_proj_factor: float = 1.7
    """The sLSTM block's feed-forward dimension over ``model_dim``, rounded likewise."""

    expert_ffn_proj_factor: float = 2.0
    """The inner dimension of ``ffn`` experts over ``model_dim``."""

    final_norm: bool = True
    """Whether a LayerNorm stands before the output projection."""

    difficulty_loss_scale: float = 1e-2
    """The weight lambda_d in eq. (21)."""

    group_loss_scale: float = 1e-2
    """The weight lambda_group in eq. (21)."""

    router_z_loss_scale: float = 1e-3
    """The weight lambda_z in eq. (21)."""

    load_balance_loss_scale: float = 1e-2
    """The weight lambda_load in eq. (21)."""

    group_loss: Literal["kl", "squared_difference", "bounded", "js"] = "kl"
    """The form of the group-wise loss, eqs. (12)-(18)."""

    load_balance_loss: Literal["switch", "squared"] = "switch"
    """The form of the load-balancing loss: eq. (20), or that of the authors' code."""

    router_z_loss_logits: Literal["biased", "unbiased"] = "biased"
    """Which logits the router z-loss, eq. (19), holds down."""

    detach_entropy_target: bool = False
    """Whether the difficulty loss, eq. (10), leaves the router's gradient alone."""

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        for name in (
            "vocab_size",
            "max_seq_len",
            "model_dim",
            "num_layers",
            "conv_kernel_size",
        ):
            if getattr(self, name) < 1:
                result.add_error(
                    f"`{name}` must be greater than or equal to 1, but is "
                    f"{getattr(self, name)} instead."
                )

        if self.num_heads < 1 or self.model_dim % self.num_heads != 0:
            result.add_error(
                f"`model_dim` ({self.model_dim}) must be a multiple of `num_heads`, "
                f"but `num_heads` is {self.num_heads}."
            )

        self._validate_mlstm(result)

        if self.num_experts < 2:
            result.add_error(
                "`num_experts` must be greater than or equal to 2, but is "
                f"{self.num_experts} instead."
            )

        if not 1 <= self.top_k <= self.num_experts:
            result.add_error(
                f"`top_k` must be between 1 and `num_experts` ({self.num_experts}), "
                f"but is {self.top_k} instead."
            )

        if self.difficulty_bias_scale < 0.0:
            result.add_error(
                "`difficulty_bias_scale` must be greater than or equal to 0, but is "
                f"{self.difficulty_bias_scale} instead."
            )

        if not self.mixer_blocks:
            result.add_error("`mixer_blocks` must name at least one block.")

        self._validate_groups(result)

        for name in (
            "difficulty_loss_scale",
            "group_loss_scale",
            "router_z_loss_scale",
            "load_balance_loss_scale",
        ):
            if getattr(self, name) < 0.0:
                result.add_error(
                    f"`{name}` must be greater than or equal to 0, but is "
                    f"{getattr(self, name)} instead."
                )

        return result

    def _validate_mlstm(self, result: ValidationResult) -> None:
        inner_dim = round_up_to_64(self.mlstm_proj_factor * self.model_dim)

        for name in ("num_heads", "qkv_block_size"):
            value = getattr(self, name)

            if value < 1 or inner_dim % value != 0:
                result.add_error(
                    f"`{name}` must divide the mLSTM's inner dimension ({inner_dim}: "
                    "`mlstm_proj_factor` * `model_dim`, rounded up to a multiple of "
                    f"64), but is {value} instead."
                )

    def _validate_groups(self, result: ValidationResult) -> None:
        if self.num_mlstm_experts is None:
            if self.num_experts % 2 != 0:
                result.add_error(
                    "`num_experts` must be even to be split in half, but is "
                    f"{self.num_experts} instead. Set `num_mlstm_experts` to split it "
                    "otherwise."
                )

            return

        if not 0 <= self.num_mlstm_experts <= self.num_experts:
            result.add_error(
                "`num_mlstm_experts` must be between 0 and `num_experts` "
                f"({self.num_experts}), but is {self.num_mlstm_experts} instead."
            )
        elif self.router == "difficulty" and self.num_mlstm_experts in (
            0,
            self.num_experts,
        ):
            result.add_error(
                "`router` 'difficulty' must have two groups of experts to choose "
                f"between, but `num_mlstm_experts` is {self.num_mlstm_experts} of "
                f"{self.num_experts}. Set `router` to 'standard'."
            )

    @property
    def mlstm_group_size(self) -> int:
        """The number of experts that a positive difficulty bias favours."""
        if self.num_mlstm_experts is None:
            return self.num_experts // 2

        return self.num_mlstm_experts
