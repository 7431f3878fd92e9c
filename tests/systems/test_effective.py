"""Parameters without a gradient, against what the equations say."""

from __future__ import annotations

import pytest
import torch

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.moxe.config import MoxEConfig
from moxe_plugin.nn.layers import round_up_to_64
from moxe_plugin.systems.effective import count_effective_parameters
from tests.models.families import create_model, get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


def _count_idle(model: AuxLossCausalLM) -> int:
    num_parameters = sum(p.numel() for p in model.parameters())

    return num_parameters - count_effective_parameters(model)


def _idle_of_token_experts(config: MoxEConfig) -> int:
    """Count what a layer of experts without memory never uses."""
    model_dim, num_taps = config.model_dim, config.conv_kernel_size
    inner_dim = round_up_to_64(config.mlstm_proj_factor * model_dim)
    gate = model_dim * model_dim // config.num_heads

    # The forget gate, and all taps of the convolution but the last.
    mlstm = (3 * inner_dim + 1) * config.num_heads + (num_taps - 1) * inner_dim
    # R; input and forget gate; the convolution, which nothing else reads.
    slstm = 4 * gate + 2 * (gate + model_dim) + (num_taps + 1) * model_dim

    num_mlstm = config.mlstm_group_size

    return num_mlstm * mlstm + (config.num_experts - num_mlstm) * slstm


def _idle_of_input_gate_bias(config: MoxEConfig, *, num_blocks: int) -> int:
    """Count the biases of sLSTM input gates, which cancel in c/n."""
    return num_blocks * config.model_dim


@pytest.mark.parametrize(
    ("arch", "mixer_slstm"),
    [
        ("tiny_token", 1),
        ("tiny_mlstm_token", 0),
        ("tiny_slstm_token", 2),
        ("quickstart_token", 1),
    ],
)
def test_experts_without_memory_leave_parameters_untrained(
    arch: str, mixer_slstm: int
) -> None:
    config = get_arch("moxe", arch)

    expected = config.num_layers * (
        _idle_of_token_experts(config)
        + _idle_of_input_gate_bias(config, num_blocks=mixer_slstm)
    )
    if config.pad_idx is not None:
        expected += config.model_dim

    assert _count_idle(create_model("moxe", arch)) == expected


@pytest.mark.parametrize("state", ["", "_dense"], ids=["subsequence", "dense"])
def test_experts_with_memory_train_all_but_one_bias(state: str) -> None:
    config = get_arch("moxe", f"tiny{state}")

    num_blocks = 1 + config.num_experts - config.mlstm_group_size
    expected = config.num_layers * _idle_of_input_gate_bias(
        config, num_blocks=num_blocks
    )

    assert _count_idle(create_model("moxe", f"tiny{state}")) == expected


def test_token_experts_of_table_1_leave_25_million_untrained() -> None:
    """REFERENCE.md: "25.5 M of the 340 M parameters can never get a gradient"."""
    config = get_arch("moxe", "340m_token")

    num_idle = config.num_layers * _idle_of_token_experts(config)

    assert num_idle / 1e6 == pytest.approx(25.5, abs=0.05)


@pytest.mark.parametrize("family", ["gemma2", "qwen_moe"])
def test_transformers_train_every_parameter(family: str) -> None:
    assert _count_idle(create_model(family)) == 0


def test_xlstm_trains_all_but_one_bias() -> None:
    # One sLSTM block of width 32.
    assert _count_idle(create_model("xlstm")) == 32


def test_tied_embedding_of_padding_trains_and_an_untied_one_does_not() -> None:
    def pad(config: object) -> None:
        config.pad_idx = 5  # type: ignore[attr-defined]  # every family's has it

    assert _count_idle(create_model("gemma2", change=pad)) == 0
    assert _count_idle(create_model("qwen_moe", change=pad)) == 32


def test_frozen_initial_zeros_do_not_count_as_untrained() -> None:
    """The authors' code starts q, k and v at 0, where no gradient appears."""
    model = create_model("moxe", "tiny_mlstm")
    num_idle = _count_idle(create_model("moxe", "tiny_mlstm"))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                parameter.zero_()

    assert _count_idle(model) == num_idle


def test_parameters_without_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="must have parameters of type float64 only"):
        count_effective_parameters(create_model("xlstm", dtype=torch.float32))
