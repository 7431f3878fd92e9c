"""Both blocks against the `xlstm` package and against the authors' JAX code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, float64
from torch.autograd import grad
from torch.nn import Module
from torch.testing import assert_close

from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.slstm import SLSTMBlock

N, S, M, H, BLOCK_SIZE = 3, 11, 16, 4, 16

PARITY_DIR = Path(
    os.environ.get(
        "MOXE_PARITY_DIR", Path(__file__).parents[3].joinpath("shared/parity")
    )
)
"""Numbers that the authors' code produced; not part of this repository."""


def randomise(module: Module) -> None:
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)


def make_mlstm_oracle(block: MLSTMBlock) -> tuple[Module, dict[str, Tensor]]:
    """Return NX-AI's block, and its parameters made from ours."""
    from xlstm import mLSTMBlock, mLSTMBlockConfig, mLSTMLayerConfig

    layer = mLSTMLayerConfig(
        conv1d_kernel_size=4,
        qkv_proj_blocksize=BLOCK_SIZE,
        num_heads=H,
        proj_factor=2.0,
        embedding_dim=M,
        context_length=S,
    )
    oracle = mLSTMBlock(mLSTMBlockConfig(mlstm=layer, _num_blocks=1, _block_idx=0))

    return oracle, {
        # Their norms store the scale minus 1.
        "xlstm_norm.weight": block.norm.weight - 1,
        "xlstm.proj_up.weight": block.up_proj.T,
        "xlstm.conv1d.conv.weight": block.conv.weight.T.unsqueeze(1),
        "xlstm.conv1d.conv.bias": block.conv.bias,
        "xlstm.q_proj.weight": block.q_proj.mT,
        "xlstm.k_proj.weight": block.k_proj.mT,
        "xlstm.v_proj.weight": block.v_proj.mT,
        "xlstm.mlstm_cell.igate.weight": block.input_gate_weight.T,
        "xlstm.mlstm_cell.igate.bias": block.input_gate_bias,
        "xlstm.mlstm_cell.fgate.weight": block.forget_gate_weight.T,
        "xlstm.mlstm_cell.fgate.bias": block.forget_gate_bias,
        "xlstm.mlstm_cell.outnorm.weight": block.out_norm.weight - 1,
        "xlstm.learnable_skip": block.skip,
        "xlstm.proj_down.weight": block.down_proj.T,
    }


def make_slstm_oracle(block: SLSTMBlock) -> tuple[Module, dict[str, Tensor]]:
    """Return NX-AI's block, and its parameters made from ours."""
    from xlstm import (
        FeedForwardConfig,
        sLSTMBlock,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
    )

    layer = sLSTMLayerConfig(
        backend="vanilla",
        num_heads=H,
        conv1d_kernel_size=4,
        embedding_dim=M,
        dtype="float32",
    )
    ffn = FeedForwardConfig(proj_factor=1.7, act_fn="swish", embedding_dim=M)
    oracle = sLSTMBlock(
        sLSTMBlockConfig(slstm=layer, feedforward=ffn, _num_blocks=1, _block_idx=0)
    )

    # (H,in,gate,out) -> 4 of (H,out,in)
    i, f, z, o = block.gate_proj.permute(2, 0, 3, 1)

    return oracle, {
        "xlstm_norm.weight": block.norm.weight - 1,
        "xlstm.conv1d.conv.weight": block.conv.weight.T.unsqueeze(1),
        "xlstm.conv1d.conv.bias": block.conv.bias,
        # What they call `fgate` produces i, and `igate` produces f.
        "xlstm.fgate.weight": i,
        "xlstm.igate.weight": f,
        "xlstm.zgate.weight": z,
        "xlstm.ogate.weight": o,
        # (H,in,gate,out) -> (H,gate*out,in)
        "xlstm.slstm_cell._recurrent_kernel_": block.recurrent_weight.permute(
            0, 2, 3, 1
        ).flatten(1, 2),
        # (H,gate,D) -> (gate*H*D)
        "xlstm.slstm_cell._bias_": block.gate_bias.transpose(0, 1).flatten(),
        "xlstm.group_norm.weight": block.out_norm.weight - 1,
        "ffn_norm.weight": block.ffn_norm.weight - 1,
        "ffn.proj_up.weight": block.ffn.up_proj.T,
        "ffn.proj_down.weight": block.ffn.down_proj.T,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_block_equals_that_of_the_xlstm_package(kind: str) -> None:
    block: MLSTMBlock | SLSTMBlock
    if kind == "mlstm":
        block = MLSTMBlock(M, num_heads=H, qkv_block_size=BLOCK_SIZE).double()
        randomise(block)
        oracle, parameters = make_mlstm_oracle(block)
    else:
        block = SLSTMBlock(M, num_heads=H).double()
        randomise(block)
        oracle, parameters = make_slstm_oracle(block)

    oracle.double()
    assert parameters.keys() == dict(oracle.named_parameters()).keys()

    seqs = torch.randn(N, S, M, dtype=float64, requires_grad=True)
    leaves = [seqs, *block.parameters()]

    actual, _ = block(seqs)
    expected = torch.func.functional_call(oracle, parameters, (seqs,))
    direction = torch.randn_like(expected)

    assert_close(actual, expected)
    assert_close(
        grad(actual, leaves, direction),
        grad(expected, leaves, direction),
        rtol=1e-9,
        atol=1e-9,
    )


def load_jax_norm_and_conv(block: Any, at: dict[str, Tensor], suffix: str) -> None:
    block.norm.weight.copy_(at["xlstm_norm/scale"])
    block.conv.weight.copy_(at["xlstm/conv1d/conv/kernel"].squeeze(-2))
    block.conv.bias.copy_(at["xlstm/conv1d/conv/bias"])
    block.out_norm.weight.copy_(at[f"xlstm/{suffix}/scale"])


@torch.no_grad()
def load_jax_mlstm(block: MLSTMBlock, at: dict[str, Tensor]) -> None:
    load_jax_norm_and_conv(block, at, "mlstm_cell/outnorm")
    block.up_proj.copy_(at["xlstm/proj_up/kernel"])
    block.q_proj.copy_(at["xlstm/q_proj/kernel"].mT)
    block.k_proj.copy_(at["xlstm/k_proj/kernel"].mT)
    block.v_proj.copy_(at["xlstm/v_proj/kernel"].mT)
    block.input_gate_weight.copy_(at["xlstm/mlstm_cell/igate/kernel"])
    block.input_gate_bias.copy_(at["xlstm/mlstm_cell/igate/bias"])
    block.forget_gate_weight.copy_(at["xlstm/mlstm_cell/fgate/kernel"])
    block.forget_gate_bias.copy_(at["xlstm/mlstm_cell/fgate/bias"])
    block.skip.copy_(at["xlstm/learnable_skip"])
    block.down_proj.copy_(at["xlstm/proj_down/kernel"])


@torch.no_grad()
def load_jax_slstm(block: SLSTMBlock, at: dict[str, Tensor]) -> None:
    load_jax_norm_and_conv(block, at, "group_norm")
    gates = [at[f"xlstm/{gate}gate/kernel"] for gate in "ifzo"]
    # 4 of ([E,]H,out,in) -> ([E,]H,in,gate,out)
    block.gate_proj.copy_(torch.stack(gates, dim=-3).movedim(-1, -3))
    block.recurrent_weight.copy_(at["xlstm/slstm_cell/_recurrent_kernel_"])
    block.gate_bias.copy_(at["xlstm/slstm_cell/_bias_"])
    block.ffn_norm.weight.copy_(at["ffn_norm/scale"])
    block.ffn.up_proj.copy_(at["ffn/proj_up/kernel"])
    block.ffn.down_proj.copy_(at["ffn/proj_down/kernel"])


@pytest.mark.skipif(not PARITY_DIR.exists(), reason=f"there is no {PARITY_DIR}")
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_equal_those_of_the_authors_code(layer: int) -> None:
    with np.load(PARITY_DIR / "A.npz") as arrays:
        fixture = {
            name: torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith(("moe/", "inter/", "out/"))
        }

    def below(prefix: str) -> dict[str, Tensor]:
        prefix = f"moe/layers/{layer}/{prefix}/"
        return {
            name.removeprefix(prefix): value.double()
            for name, value in fixture.items()
            if name.startswith(prefix)
        }

    def stack(indices: list[int]) -> dict[str, Tensor]:
        experts = [below(f"experts/{i}") for i in indices]
        return {name: torch.stack([e[name] for e in experts]) for name in experts[0]}

    def make(num_experts: int | None) -> tuple[MLSTMBlock, SLSTMBlock]:
        return (
            MLSTMBlock(
                M, num_heads=H, qkv_block_size=BLOCK_SIZE, num_experts=num_experts
            ).double(),
            SLSTMBlock(M, num_heads=H, num_experts=num_experts).double(),
        )

    mlstm, slstm = make(None)
    load_jax_slstm(slstm, below("sequence_mixer/blocks/0"))
    load_jax_mlstm(mlstm, below("sequence_mixer/blocks/1"))

    name = "inter/embed" if layer == 0 else "out/hidden_states"
    seqs = fixture[name].double()
    seqs = seqs if layer == 0 else seqs[layer - 1]
    after_slstm, _ = slstm(seqs)
    after_mlstm, _ = mlstm(after_slstm)

    # Theirs is float32: parity/README.md allows 1e-4.
    expected = fixture[f"inter/layers/{layer}/mixer_block_outputs"].double()
    assert_close(torch.stack([after_slstm, after_mlstm]), expected, rtol=0, atol=1e-4)

    mlstms, slstms = make(2)
    load_jax_mlstm(mlstms, stack([0, 1]))
    load_jax_slstm(slstms, stack([2, 3]))

    # Their experts see every token as a sequence of length 1.
    tokens = fixture[f"inter/layers/{layer}/mixer_out"].double().view(-1, 1, M)
    tokens = tokens.expand(2, -1, -1, -1)
    actual = torch.cat([mlstms(tokens)[0], slstms(tokens)[0]]).squeeze(-2)

    expected = fixture[f"inter/layers/{layer}/expert_outputs"].double()
    assert_close(actual, expected, rtol=0, atol=1e-4)
