"""The systems of the paper, told apart by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

LABELS: Final[Mapping[str, str]] = {
    "moxe": "MoxE",
    "moxe_token": "MoxE, token",
    "moxe_dense": "MoxE, dense",
    "moxe_gamma0": "MoxE, gamma = 0",
    "moxe_standard": "MoxE-Standard",
    "moxe_no_group_loss": "MoxE, no group loss",
    "moxe_ffn": "xLSTM-MoE (FFN experts)",
    "moxe_mlstm": "mLSTM-MoE",
    "moxe_slstm": "sLSTM-MoE",
    "xlstm": "xLSTM[5:1]",
    "gemma2": "Gemma 2",
    "qwen_moe": "Qwen1.5-MoE",
}
"""How pages call the systems, in their order."""


def name_system(family: str, config: Mapping[str, Any]) -> str:
    """Name the system that a model is.

    :param family: The model family.
    :param config: The model's configuration as plain values.

    :returns: The family; for MoxE with what differs from the full model appended, in
        the words of its architectures.
    """
    if family != "moxe":
        return family

    parts = [family]

    if config["experts"] == "ffn":
        parts.append("ffn")
    elif config["num_mlstm_experts"] == config["num_experts"]:
        parts.append("mlstm")
    elif config["num_mlstm_experts"] == 0:
        parts.append("slstm")
    elif config["router"] == "standard":
        parts.append("standard")
    else:
        if config["difficulty_bias_scale"] == 0.0:
            parts.append("gamma0")
        if config["group_loss_scale"] == 0.0:
            parts.append("no_group_loss")

    # Runs of before there was a choice have no such field.
    if (rule := config.get("expert_selection", "top_k")) != "top_k":
        parts.append(rule)

    if config["expert_state"] != "subsequence":
        parts.append(config["expert_state"])

    return "_".join(parts)


def label_system(system: str) -> str:
    """Say how pages call a system.

    :param system: As :func:`name_system` names it.

    :returns: The label; the name itself for a system that no claim is about.
    """
    return LABELS.get(system, system)
