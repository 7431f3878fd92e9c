"""What a configuration of MoxE must fulfil."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairseq2.utils.validation import ValidationResult

from moxe_plugin.models.validation import (
    check_choices,
    check_counts,
    check_factors,
    check_scales,
    check_vocabulary,
)
from moxe_plugin.nn.layers import round_up_to_64

if TYPE_CHECKING:
    from moxe_plugin.models.moxe.config import MoxEConfig


def validate_moxe_config(config: MoxEConfig) -> ValidationResult:
    """Check a configuration.

    :param config: The configuration.

    :returns: Its errors, if there are any.
    """
    result = ValidationResult()

    check_choices(config, result)

    check_vocabulary(config, result)

    check_counts(
        config, ["max_seq_len", "model_dim", "num_layers", "conv_kernel_size"], result
    )

    factors = ["slstm_ffn_proj_factor", "expert_ffn_proj_factor"]

    check_factors(config, factors, config.model_dim, result)

    if config.num_heads < 1 or config.model_dim % config.num_heads != 0:
        result.add_error(
            f"`model_dim` ({config.model_dim}) must be a multiple of `num_heads`, "
            f"but `num_heads` is {config.num_heads}."
        )

    _validate_mlstm(config, result)

    if config.num_experts < 2:
        result.add_error(
            "`num_experts` must be greater than or equal to 2, but is "
            f"{config.num_experts} instead."
        )

    if not 1 <= config.top_k <= config.num_experts:
        result.add_error(
            f"`top_k` must be between 1 and `num_experts` ({config.num_experts}), "
            f"but is {config.top_k} instead."
        )

    if not config.mixer_blocks:
        result.add_error("`mixer_blocks` must name at least one block.")

    _validate_groups(config, result)
    _validate_selection(config, result)

    scales = [
        "difficulty_bias_scale",
        "difficulty_loss_scale",
        "group_loss_scale",
        "router_z_loss_scale",
        "load_balance_loss_scale",
        "dynamic_loss_scale",
        "load_bias_rate",
    ]

    check_scales(config, scales, result)

    return result


def _validate_mlstm(config: MoxEConfig, result: ValidationResult) -> None:
    if not check_factors(config, ["mlstm_proj_factor"], config.model_dim, result):
        return

    inner_dim = round_up_to_64(config.mlstm_proj_factor * config.model_dim)

    for name in ("num_heads", "qkv_block_size"):
        value = getattr(config, name)

        if value < 1 or inner_dim % value != 0:
            result.add_error(
                f"`{name}` must divide the mLSTM's inner dimension ({inner_dim}: "
                "`mlstm_proj_factor` * `model_dim`, rounded up to a multiple of "
                f"64), but is {value} instead."
            )


def _validate_groups(config: MoxEConfig, result: ValidationResult) -> None:
    if config.num_mlstm_experts is None:
        if config.num_experts % 2 != 0:
            result.add_error(
                "`num_experts` must be even to be split in half, but is "
                f"{config.num_experts} instead. Set `num_mlstm_experts` to split it "
                "otherwise."
            )

        return

    if not 0 <= config.num_mlstm_experts <= config.num_experts:
        result.add_error(
            "`num_mlstm_experts` must be between 0 and `num_experts` "
            f"({config.num_experts}), but is {config.num_mlstm_experts} instead."
        )
    elif config.router == "difficulty" and config.num_mlstm_experts in (
        0,
        config.num_experts,
    ):
        result.add_error(
            "`router` 'difficulty' must have two groups of experts to choose "
            f"between, but `num_mlstm_experts` is {config.num_mlstm_experts} of "
            f"{config.num_experts}. Set `router` to 'standard'."
        )


def _validate_selection(config: MoxEConfig, result: ValidationResult) -> None:
    max_top_k = config.max_top_k

    if max_top_k is not None and not 1 <= max_top_k <= config.num_experts:
        result.add_error(
            f"`max_top_k` must be between 1 and `num_experts` ({config.num_experts}), "
            f"but is {max_top_k} instead."
        )

    if not 0.0 < config.dynamic_threshold <= 1.0:
        result.add_error(
            "`dynamic_threshold` must be greater than 0 and at most 1, but is "
            f"{config.dynamic_threshold} instead."
        )

    for name in ("workspace_threshold", "difficulty_threshold"):
        value = getattr(config, name)

        if not 0.0 <= value <= 1.0:
            result.add_error(
                f"`{name}` must be between 0 and 1, but is {value} instead."
            )
