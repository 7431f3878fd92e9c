"""Names of the parameters of blocks and experts in the authors' code."""

from __future__ import annotations

import torch

from moxe_plugin.models.interop import AuthorsParameter, same, squeezed, transposed


def mlstm_block_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of an mLSTM block.

    :param prefix: Their name of the block.

    :returns: Correspondences by our name within the block.
    """
    layer = f"{prefix}/xlstm"
    cell = f"{layer}/mlstm_cell"

    return {
        "norm.weight": same(f"{prefix}/xlstm_norm/scale"),
        "up_proj": same(f"{layer}/proj_up/kernel"),
        "conv.weight": squeezed(f"{layer}/conv1d/conv/kernel", 1),
        "conv.bias": same(f"{layer}/conv1d/conv/bias"),
        "q_proj": transposed(f"{layer}/q_proj/kernel"),
        "k_proj": transposed(f"{layer}/k_proj/kernel"),
        "v_proj": transposed(f"{layer}/v_proj/kernel"),
        "input_gate_weight": same(f"{cell}/igate/kernel"),
        "input_gate_bias": same(f"{cell}/igate/bias"),
        "forget_gate_weight": same(f"{cell}/fgate/kernel"),
        "forget_gate_bias": same(f"{cell}/fgate/bias"),
        "out_norm.weight": same(f"{cell}/outnorm/scale"),
        "skip": same(f"{layer}/learnable_skip"),
        "down_proj": same(f"{layer}/proj_down/kernel"),
    }


def slstm_block_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of an sLSTM block.

    :param prefix: Their name of the block.

    :returns: Correspondences by our name within the block.
    """
    layer = f"{prefix}/xlstm"

    gates = AuthorsParameter(
        tuple(f"{layer}/{gate}gate/kernel" for gate in "ifzo"),
        # (H,out,in) each -> (H,in,gate,out)
        lambda theirs: torch.stack([kernel.mT for kernel in theirs], dim=2),
        lambda ours: [kernel.mT for kernel in ours.unbind(2)],
    )

    return {
        "norm.weight": same(f"{prefix}/xlstm_norm/scale"),
        "conv.weight": squeezed(f"{layer}/conv1d/conv/kernel", 1),
        "conv.bias": same(f"{layer}/conv1d/conv/bias"),
        "gate_proj": gates,
        "recurrent_weight": same(f"{layer}/slstm_cell/_recurrent_kernel_"),
        "gate_bias": same(f"{layer}/slstm_cell/_bias_"),
        "out_norm.weight": same(f"{layer}/group_norm/scale"),
        "ffn_norm.weight": same(f"{prefix}/ffn_norm/scale"),
        "ffn.up_proj": same(f"{prefix}/ffn/proj_up/kernel"),
        "ffn.down_proj": same(f"{prefix}/ffn/proj_down/kernel"),
    }


def ffn_expert_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of a feed-forward expert.

    :param prefix: Their name of the expert.

    :returns: Correspondences by our name within the expert.
    """
    return {
        "up_proj": AuthorsParameter(
            (f"{prefix}/w1/kernel", f"{prefix}/w3/kernel"),
            lambda theirs: torch.cat(theirs, dim=-1),
            lambda ours: list(ours.chunk(2, dim=-1)),
        ),
        "down_proj": same(f"{prefix}/w2/kernel"),
    }
