"""What the families over transformers modules share, beyond the common contract."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from fairseq2.error import NotSupportedError
from fairseq2.gang import create_fake_gangs
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor, nn
from torch.nn import Module

from moxe_plugin.models.hf import HfCacheState, HfCausalLM
from tests.common import assert_close
from tests.models.families import create_model, get_arch, get_family, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

hf_families = pytest.mark.parametrize("family", ["gemma2", "qwen_moe"])


def _create(
    family: str, arch: str = "tiny", dtype: torch.dtype = torch.float32
) -> HfCausalLM:
    model = create_model(family, arch, dtype=dtype)
    assert isinstance(model, HfCausalLM)

    return model


def _logits(
    model: HfCausalLM, seqs: Tensor, state_bag: IncrementalStateBag | None = None
) -> Tensor:
    logits: Tensor = model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

    return logits


@hf_families
def test_weights_start_as_in_transformers(family: str) -> None:
    model = _create(family, "quickstart")

    for name, module in model.hf.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(module.weight.detach().mean())) < 0.003, name
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()

    embed = model.hf.get_input_embeddings()
    assert isinstance(embed, nn.Embedding)
    assert not embed.weight[1].any(), "the row of the padding token"


@hf_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_frequencies_are_exact_in_any_data_type(
    family: str, dtype: torch.dtype
) -> None:
    model = _create(family, dtype=dtype)

    expected = 10_000 ** -(torch.arange(0, 8, 2) / 8)

    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert name.endswith("rotary_emb.inv_freq")
        assert_close(buffer, expected)

    assert {p.dtype for p in model.parameters()} == {dtype}


@hf_families
def test_too_long_sequence_is_refused(family: str) -> None:
    model = _create(family).eval()
    message = r"at most `max_seq_len` \(64\) tokens, but has 65"

    with pytest.raises(ValueError, match=message):
        _logits(model, random_ids(1, 65))

    packed = random_ids(70)
    with pytest.raises(ValueError, match=message):
        model(packed, BatchLayout.of(packed, [5, 65], packed=True))

    # Together longer than `max_seq_len`, which is about one sequence.
    model(packed, BatchLayout.of(packed, [35, 35], packed=True))

    state_bag = IncrementalStateBag(max_num_steps=100)
    _logits(model, random_ids(1, 64), state_bag)
    state_bag.increment_step_nr(64)
    with pytest.raises(ValueError, match=message):
        _logits(model, random_ids(1, 1), state_bag)


@hf_families
def test_state_takes_no_padded_batches(family: str) -> None:
    model = _create(family).eval()
    state_bag = IncrementalStateBag(max_num_steps=64)

    seqs = random_ids(2, 6)
    with pytest.raises(ValueError, match="`seqs` must not be padded"):
        model(seqs, BatchLayout.of(seqs, [2, 6]), state_bag=state_bag)


@hf_families
def test_training_leaves_the_state_alone(family: str) -> None:
    model = _create(family).train()
    state_bag = IncrementalStateBag(max_num_steps=64)
    seqs = random_ids(2, 6)

    assert_close(_logits(model, seqs, state_bag), _logits(model, seqs))
    assert state_bag.maybe_get_state(model, HfCacheState) is None


@hf_families
def test_state_knows_its_size(family: str) -> None:
    model = _create(family).eval()
    config = get_arch(family, "tiny")
    state_bag = IncrementalStateBag(max_num_steps=64)

    _logits(model, random_ids(3, 7), state_bag)

    # Keys and values of 3 sequences, 7 tokens, 2 heads of 8 numbers of 4 bytes.
    expected = config.num_layers * 2 * 3 * 7 * 2 * 8 * 4
    assert state_bag.size_bytes() == expected
    assert state_bag.capacity_bytes() == expected

    state_bag.reorder(torch.tensor([0]))
    assert state_bag.size_bytes() == expected // 3


@hf_families
def test_checkpoint_loads_into_a_fresh_model(family: str, tmp_path: Path) -> None:
    model = _create(family).eval()

    # The layout in which fairseq2 saves a model in training.
    path = tmp_path / "model"
    path.joinpath("pp_00", "tp_00").mkdir(parents=True)
    torch.save(model.state_dict(), path / "pp_00" / "tp_00" / "sdp_00.pt")

    loaded = get_family(family).load_custom_model(
        path,
        get_arch(family, "tiny"),
        create_fake_gangs(torch.device("cpu")),
        torch.float32,
        load_rank0_only=False,
        mmap=False,
        restrict=None,
    )
    assert isinstance(loaded, HfCausalLM)

    seqs = random_ids(2, 9)
    assert_close(_logits(loaded.eval(), seqs), _logits(model, seqs), rtol=0.0, atol=0.0)


@hf_families
def test_family_has_no_meta_initialisation(family: str) -> None:
    assert not get_family(family).supports_meta
    assert get_family(family).supports_fsdp
    assert get_family(family).supports_compilation
    assert get_family(family).supports_layerwise_ac


@hf_families
def test_embedding_is_listed_once(family: str) -> None:
    model = _create(family)
    names = [n for n in model.state_dict() if "embed" in n]

    assert names == ["hf.model.embed_tokens.weight"]

    seqs = random_ids(2, 3)
    assert_close(
        model.decoder_frontend.embed(seqs), model.hf.get_input_embeddings()(seqs)
    )


@hf_families
def test_checkpointed_and_compiled_layers_compute_the_same(family: str) -> None:
    model = _create(family).train()
    seqs = random_ids(2, 9)

    def run() -> tuple[list[str], Tensor, list[Tensor]]:
        model.zero_grad()
        loss: Tensor = model(seqs, BatchLayout.of(seqs), seqs)
        torch.autograd.backward(loss)
        grads = [cast(Tensor, p.grad).clone() for p in model.parameters()]

        return list(model.state_dict()), loss, grads

    keys, loss, grads = run()

    get_family(family).apply_layerwise_ac(model, every_nth_layer=2)
    get_family(family).compile(model, backend="eager")
    actual_keys, actual_loss, actual_grads = run()

    assert actual_keys == keys
    assert_close(actual_loss, loss)
    torch.testing.assert_close(actual_grads, grads)


@hf_families
def test_fsdp_wraps_layers_or_the_stack(family: str) -> None:
    wrapped: list[Module] = []

    def wrapper(module: Module, reshard_after_forward: bool | None = None) -> Module:
        assert not reshard_after_forward
        wrapped.append(module)

        return module

    model = _create(family)
    get_family(family).apply_fsdp(model, "layer", wrapper)
    assert wrapped == list(model.hf.get_submodule("model.layers").children())

    wrapped.clear()
    get_family(family).apply_fsdp(model, "stack", wrapper)
    assert wrapped == [model.hf]

    with pytest.raises(NotSupportedError, match="`granularity` must be 'layer' or"):
        get_family(family).apply_fsdp(model, "head", wrapper)


@hf_families
def test_quickstart_has_nearly_1_9_million_parameters(family: str) -> None:
    num_parameters = sum(p.numel() for p in _create(family, "quickstart").parameters())

    assert num_parameters == pytest.approx(1_900_000, rel=0.05)
