"""The xLSTM of NX-AI's package `xlstm`, beside which ours is timed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from fairseq2.nn import BatchLayout
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from moxe_plugin.models.xlstm.config import XLSTMConfig


def check_nxai(device: torch.device) -> None:
    """Look for what their model needs.

    :param device: Where to compute.

    :raises ValueError: It is not here.
    """
    if find_spec("xlstm") is None:
        raise ValueError(
            "`nxai_xlstm` needs the package xlstm, which is not installed: "
            "`pip install xlstm`."
        )

    if device.type != "cpu":
        raise ValueError(
            f"`nxai_xlstm` needs `device` cpu, but it is '{device}' instead: their "
            "kernels for GPUs are compiled by a CUDA toolkit, which is not looked for."
        )


class NXAIModel(nn.Module):
    """Their language model, called as ours in training.

    :param model: Their ``xLSTMLMModel``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()

        self.model = model

    @override
    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        targets: Tensor,
        *,
        reduction: Literal["sum", "mean"],
    ) -> Tensor:
        """Compute the loss.

        :param seqs: Token ids. *Shape:* ``(N,S)``.
        :param seqs_layout: Not read: there is no padding.
        :param targets: The next ids. *Shape:* ``(N,S)``.
        :param reduction: How the tokens' losses become one.

        :returns: Cross-entropy in nats. *Shape:* ``()``.
        """
        logits: Tensor = self.model(seqs)

        return cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction
        )


def create_nxai_model(config: XLSTMConfig, length: int) -> NXAIModel:
    """Create their model of our sizes, with PyTorch code only (``vanilla``).

    :param config: The sizes.
    :param length: The length of sequences, which their parallel form is made for.

    :returns: The model.
    """
    import xlstm

    block_config: Any = xlstm.xLSTMLMModelConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(
            mlstm=xlstm.mLSTMLayerConfig(
                conv1d_kernel_size=config.conv_kernel_size,
                qkv_proj_blocksize=config.qkv_block_size,
                num_heads=config.num_heads,
                proj_factor=config.mlstm_proj_factor,
            )
        ),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(
                backend="vanilla",
                num_heads=config.num_heads,
                conv1d_kernel_size=config.conv_kernel_size,
                dtype="float32",
            ),
            feedforward=xlstm.FeedForwardConfig(
                proj_factor=config.slstm_ffn_proj_factor, act_fn="swish"
            ),
        ),
        context_length=length,
        num_blocks=config.num_blocks,
        embedding_dim=config.model_dim,
        slstm_at=list(range(0, config.num_blocks, config.slstm_period)),
        vocab_size=config.vocab_size,
    )

    return NXAIModel(xlstm.xLSTMLMModel(block_config))
