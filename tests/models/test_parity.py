"""Equality with numbers that the authors' own code produced.

The fixtures lie in the directory that ``MOXE_PARITY_DIR`` names, by default
``../shared/parity`` beside the checkout; without it, one of them is among our own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import cross_entropy

from moxe_plugin.models.clm import AuxLossCausalLM, LossTerms
from moxe_plugin.models.interop import AuthorsParameter, from_authors, to_authors
from moxe_plugin.models.moxe import MoxEConfig, MoxELM, create_moxe_model
from moxe_plugin.models.moxe.interop import authors_moxe_parameters
from moxe_plugin.models.xlstm import XLSTMConfig, create_xlstm_model
from moxe_plugin.models.xlstm.interop import authors_xlstm_parameters
from tests.common import assert_close


def _find_parity_dir() -> Path:
    if directory := os.environ.get("MOXE_PARITY_DIR"):
        return Path(directory)

    shared = Path(__file__).parents[3].joinpath("shared/parity")

    return shared if shared.is_dir() else Path(__file__).parents[1] / "fixtures/parity"


PARITY_DIR = _find_parity_dir()

FIXTURES = sorted(path.stem for path in PARITY_DIR.glob("*.npz"))

assert FIXTURES, f"`MOXE_PARITY_DIR` ({PARITY_DIR}) must have fixtures, but has none."

Arrays = dict[str, npt.NDArray[Any]]

# Their config string "masked" runs the proportional function, and the other way round.
SWAPPED_MODULATIONS = {
    "standard": "standard",
    "masked": "proportional",
    "proportional": "masked",
}


def _read(name: str) -> tuple[dict[str, Any], Arrays, Arrays]:
    info = json.loads(PARITY_DIR.joinpath(f"{name}.json").read_text())

    with np.load(PARITY_DIR.joinpath(f"{name}.npz")) as arrays:
        float32 = dict(arrays)

    with np.load(PARITY_DIR.joinpath("f64", f"{name}.npz")) as arrays:
        float64 = dict(arrays)

    return info, float32, float64


def _shared_fields(config: dict[str, Any]) -> dict[str, Any]:
    mlstm = config["mlstm_block"]["mlstm"]

    return {
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["context_length"],
        "model_dim": config["embedding_dim"],
        "num_heads": mlstm["num_heads"],
        "qkv_block_size": mlstm["qkv_proj_blocksize"],
        "conv_kernel_size": mlstm["conv1d_kernel_size"],
        "slstm_ffn_proj_factor": config["slstm_block"]["feedforward"]["proj_factor"],
    }


def _moxe_config(info: dict[str, Any]) -> MoxEConfig:
    config, coefs = info["config"], info["loss_coefs"]

    layer_type, expert_type = config["moe_layer_type"], config["expert_type"]

    num_mlstm_experts = {
        "mlstm": config["num_experts"],
        "slstm": 0,
    }.get(expert_type)

    # These layer types ignore the router's type.
    has_difficulty = (
        layer_type == "moxe" and config["router_type"] == "conditioned_addition"
    )

    return MoxEConfig(
        **_shared_fields(config["xlstm"]),
        num_layers=config["num_layers"],
        num_experts=config["num_experts"],
        num_mlstm_experts=num_mlstm_experts,
        top_k=config["top_k_experts"],
        mixer_blocks=(
            ["slstm", "mlstm"] if layer_type == "moxe" else [layer_type, layer_type]
        ),
        experts="ffn" if expert_type == "mlp" else "xlstm",
        expert_state="token",
        router="difficulty" if has_difficulty else "standard",
        modulation=SWAPPED_MODULATIONS[config["modulation_bias"]],  # type: ignore[arg-type]  # a literal
        difficulty_bias_scale=config["gamma"],
        difficulty_threshold=config["difficulty_threshold"],
        router_bias=config["gate_bias"],
        final_norm=config["post_layers_norm"],
        load_balance_loss="squared",
        difficulty_loss_scale=coefs["d"],
        group_loss_scale=coefs["group"],
        router_z_loss_scale=coefs["z"],
        load_balance_loss_scale=coefs["lb"],
    )


def _xlstm_config(info: dict[str, Any]) -> XLSTMConfig:
    config = info["config"]
    assert config["slstm_at"] == list(range(0, config["num_blocks"], 6))

    return XLSTMConfig(
        **_shared_fields(config), num_blocks=config["num_blocks"], slstm_period=6
    )


def _create(
    info: dict[str, Any],
) -> tuple[AuxLossCausalLM, dict[str, AuthorsParameter]]:
    if "moe_layer_type" not in info["config"]:
        xlstm_config = _xlstm_config(info)

        return create_xlstm_model(xlstm_config), authors_xlstm_parameters(xlstm_config)

    config = _moxe_config(info)

    return create_moxe_model(config), authors_moxe_parameters(config)


def _parameters(arrays: Arrays) -> dict[str, Tensor]:
    others = ("in/", "out/", "inter/", "loss/", "grad/")

    return {
        name: torch.from_numpy(array)
        for name, array in arrays.items()
        if not name.startswith(others)
    }


def _run(model: AuxLossCausalLM, arrays: Arrays) -> tuple[LossTerms, Tensor]:
    ids = torch.from_numpy(arrays["in/input_ids"]).long()

    # Their cross-entropy drops the last position; their router's losses keep it.
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, -1] = False
    labels = torch.from_numpy(arrays.get("in/labels", arrays["in/input_ids"])).long()

    terms, logits = model(
        ids,
        BatchLayout.of(ids),
        labels.roll(-1, dims=1),
        target_mask=target_mask,
        reduction="mean",
        return_logits=True,
        return_terms=True,
    )

    return terms, logits


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_losses_and_gradients_equal_those_of_the_authors(
    name: str, dtype: torch.dtype
) -> None:
    info, float32, float64 = _read(name)
    arrays = float64 if dtype == torch.float64 else float32

    model, parameters = _create(info)
    model.load_state_dict(
        from_authors(_parameters(float32), parameters, model.state_dict())
    )
    model.to(dtype).train()

    terms, logits = _run(model, float32)

    atol = 1e-9 if dtype == torch.float64 else 1e-4

    def compare(actual: Tensor, key: str, atol: float = atol) -> None:
        expected = torch.from_numpy(arrays[key])
        assert_close(actual.detach().to(dtype), expected, atol=atol, rtol=0.0)

    compare(logits, "out/logits")

    # fairseq2's cross-entropy is float32.
    compare(terms.nll, "loss/ce", 1e-5)

    for ours, theirs in (
        ("router_z", "z"),
        ("load_balance", "lb"),
        ("difficulty", "d"),
        ("group", "group"),
    ):
        if ours in terms.aux_losses:
            compare(terms.aux_losses[ours], f"loss/{theirs}")

    if isinstance(model, MoxELM):
        compare(terms.aggregate, "loss/total", 1e-5)

        _compare_layers(model, float32, arrays, dtype, atol)

    # fairseq2's cross-entropy is float32, so the gradient of the same loss is taken
    # from the logits, in their precision.
    targets = torch.from_numpy(float32["in/input_ids"]).long()[:, 1:]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    for term, scale in model.aux_loss_scales.items():
        loss = loss + scale * terms.aux_losses[term]
    loss.backward()

    gradient_rtol = 1e-8 if dtype == torch.float64 else 1e-3
    if name == "xlstm" and dtype == torch.float32:
        # A normaliser is near 0: in float64, rounding the parameters once to float32's
        # last bit moves gradients by 3e-4.
        gradient_rtol = 3e-3

    _compare_gradients(model, parameters, arrays, gradient_rtol)


def _compare_layers(
    model: MoxELM, inputs: Arrays, arrays: Arrays, dtype: torch.dtype, atol: float
) -> None:
    ids = torch.from_numpy(inputs["in/input_ids"]).long()
    hidden, _ = model.decoder_frontend(ids, BatchLayout.of(ids))

    for idx, layer in enumerate(model.decoder.layers):
        hidden, routing = layer(hidden, None)

        for actual, key in (
            (hidden, "out/hidden_states"),
            (routing.biased_logits, "out/router_logits"),
            (routing.router_probs, "out/router_probs"),
            (routing.router_logits, "out/unbiased_logits"),
            (routing.difficulty, "out/d_t"),
        ):
            if actual is None or key not in arrays:
                continue

            expected = torch.from_numpy(arrays[key][idx])
            assert_close(
                actual.detach().to(dtype).reshape(expected.shape),
                expected,
                atol=atol,
                rtol=0.0,
            )


def _compare_gradients(
    model: AuxLossCausalLM,
    parameters: dict[str, AuthorsParameter],
    arrays: Arrays,
    rtol: float,
) -> None:
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = {
        key.removeprefix("grad/"): torch.from_numpy(array)
        for key, array in arrays.items()
        if key.startswith("grad/")
    }
    if not expected:
        assert not isinstance(model, MoxELM), "only the bare stacks have no gradients"

        return

    actual = to_authors(gradients, parameters)
    assert actual.keys() == expected.keys()

    for name, gradient in actual.items():
        # Some gradients are 0 but for rounding, as that of an input gate's bias.
        atol = rtol * max(float(expected[name].abs().max()), 1e-6)
        torch.testing.assert_close(
            gradient.to(expected[name].dtype),
            expected[name],
            atol=atol,
            rtol=0.0,
            msg=lambda msg, name=name: f"{name}: {msg}",  # type: ignore[misc]  # bound
        )


@pytest.mark.parametrize("name", FIXTURES)
def test_conversion_there_and_back_changes_nothing(name: str) -> None:
    info, arrays, _ = _read(name)
    theirs = _parameters(arrays)

    model, parameters = _create(info)
    ours = from_authors(theirs, parameters, model.state_dict())
    back = to_authors(ours, parameters)

    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
