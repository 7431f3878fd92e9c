"""Configuration of MoxE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.models.moxe.validation import validate_moxe_config

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
    """The number of experts chosen for a token: MoxE eq. (3). ``dynamic`` selection
    does not read it."""

    expert_selection: Literal["top_k", "dynamic", "global_workspace", "loss_free"] = (
        "top_k"
    )
    """How the experts of a token are chosen, with either ``router``:

    - ``top_k``: the most probable ones, as in the paper;
    - ``dynamic``: as many as reach ``dynamic_threshold`` (Huang et al., 2403.07652);
    - ``global_workspace``: ``top_k``, but all for an uncertain token, in training (GW-
      MoE, 2406.12375, does so in finetuning). It adds no parameter: set it to finetune
      a model that was pretrained with ``top_k``;
    - ``loss_free``: by probability plus a bias that follows past loads (2408.15664),
      meant to go with ``load_balance_loss_scale`` 0. It adds ``num_experts`` parameters
      to a layer, hence no checkpoint fits both it and another selection."""

    dynamic_threshold: float = 0.4
    """The probability that the experts of a token reach together, with ``dynamic``; the
    value of its paper, which has 16 experts."""

    max_top_k: int | None = None
    """The largest number of experts of a token, with ``dynamic``; ``None`` means all.
    """

    workspace_threshold: float = 0.9
    """The entropy, as a share of ``ln(num_experts)``, above which a token is uncertain,
    with ``global_workspace``. Our choice: its paper sets it for each model."""

    workspace_at_inference: bool = False
    """Whether uncertain tokens go to all experts in evaluation mode too. GW-MoE does
    not; but then an expert with memory sees fewer tokens than in training."""

    load_bias_rate: float = 1e-3
    """How far a step moves the bias of an expert, with ``loss_free``, as in its paper.
    """

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

    backend: Literal["auto", "torch", "native", "triton"] = "auto"
    """What computes the sLSTM's loop over time, and the router: ``native`` is C++ for
    CPUs, ``triton`` kernels for GPUs, which in training are those of whole blocks;
    ``auto`` takes the one or the other where it can run, else ``torch``."""

    difficulty_loss_scale: float = 1e-2
    """The weight lambda_d in eq. (21)."""

    group_loss_scale: float = 1e-2
    """The weight lambda_group in eq. (21)."""

    router_z_loss_scale: float = 1e-3
    """The weight lambda_z in eq. (21)."""

    load_balance_loss_scale: float = 1e-2
    """The weight lambda_load in eq. (21)."""

    dynamic_loss_scale: float = 1e-4
    """The weight of the loss that keeps routers certain, with ``dynamic``, as in its
    paper."""

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
        return validate_moxe_config(self)

    @property
    def mlstm_group_size(self) -> int:
        """The number of experts that a positive difficulty bias favours."""
        if self.num_mlstm_experts is None:
            return self.num_experts // 2

        return self.num_mlstm_experts

    @property
    def largest_top_k(self) -> int:
        """The largest number of experts that a token can have at inference."""
        if self.expert_selection == "dynamic":
            return self.num_experts if self.max_top_k is None else self.max_top_k

        if self.expert_selection == "global_workspace" and self.workspace_at_inference:
            return self.num_experts

        return self.top_k
