"""The FLOPs of any family's forward pass, from its configuration alone."""

from __future__ import annotations

from moxe_plugin.models.gemma2.config import Gemma2Config
from moxe_plugin.models.gemma2.flops import gemma2_forward_flops
from moxe_plugin.models.moxe.config import MoxEConfig
from moxe_plugin.models.moxe.flops import moxe_forward_flops
from moxe_plugin.models.qwen_moe.config import QwenMoEConfig
from moxe_plugin.models.qwen_moe.flops import qwen_moe_forward_flops
from moxe_plugin.models.xlstm.config import XLSTMConfig
from moxe_plugin.models.xlstm.flops import xlstm_forward_flops


def forward_flops_per_token(config: object, context_len: int) -> int:
    """Count the useful FLOPs of a token's forward pass.

    A multiply-add is 2 FLOPs; only matrix products count, of the chosen experts, and
    without padding. :mod:`moxe_plugin.nn.flops` says the rest. A training step takes
    three times as many (backwards, each product becomes two).

    :param config: The configuration of a model of this package.
    :param context_len: The length of the sequence, of which this is the mean over
        tokens.

    :returns: FLOPs per token.

    :raises ValueError: ``context_len`` is less than 1, or ``config`` is of no family of
        this package.
    """
    if context_len < 1:
        raise ValueError(
            "`context_len` must be greater than or equal to 1, but is "
            f"{context_len} instead."
        )

    match config:
        case MoxEConfig():
            flops = moxe_forward_flops(config, context_len)
        case XLSTMConfig():
            flops = xlstm_forward_flops(config, context_len)
        case Gemma2Config():
            flops = gemma2_forward_flops(config, context_len)
        case QwenMoEConfig():
            flops = qwen_moe_forward_flops(config, context_len)
        case _:
            raise ValueError(
                "`config` must be the configuration of a family of this package, but "
                f"is of type `{type(config)}` instead."
            )

    return round(flops)
