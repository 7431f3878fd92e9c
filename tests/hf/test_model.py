"""Tests of moxe_plugin/hf: our models do in transformers what they do in fairseq2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.generation.sampling import SamplingSequenceGenerator, TopKSampler
from fairseq2.nn import BatchLayout
from fairseq2.nn.utils.padding import pad_seqs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from moxe_plugin.hf import MoxEConfig, MoxEForCausalLM, RecurrentCache
from moxe_plugin.hf.folder import open_exported
from moxe_plugin.train.launch import load_preset, run_recipe
from tests.common import assert_close
from tests.hf.conftest import Export
from tests.models.families import FAMILIES, RECURRENT_FAMILIES, get_arch, random_ids

both_recurrent = pytest.mark.parametrize("family", RECURRENT_FAMILIES)

LENS = [9, 4, 6]
WIDTH = 9


def _load(export: Export, family: str) -> Any:
    load: Any = AutoModelForCausalLM.from_pretrained

    return load(export(family).folder).eval()


def _pad(rows: list[Tensor], *, shift: int | None) -> tuple[Tensor, Tensor]:
    """Pad on the left, or behind a shift on both sides."""
    ids = torch.full((len(rows), WIDTH), 1)
    mask = torch.zeros_like(ids)

    for i, row in enumerate(rows):
        room = WIDTH - len(row)
        begin = room if shift is None else min(shift, room)

        ids[i, begin : begin + len(row)] = row
        mask[i, begin : begin + len(row)] = 1

    return ids, mask


@both_recurrent
@pytest.mark.parametrize("shift", [0, 2, None], ids=["right", "both", "left"])
@torch.no_grad()
def test_padding_changes_no_token(
    export: Export, family: str, shift: int | None
) -> None:
    model = _load(export, family)
    rows = [random_ids(n) for n in LENS]
    ids, mask = _pad(rows, shift=shift)

    logits = model(ids, attention_mask=mask).logits

    for i, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        assert_close(logits[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-5)


@both_recurrent
def test_labels_give_the_mean_loss_of_the_next_tokens(
    export: Export, family: str
) -> None:
    model = _load(export, family)
    ids, mask = _pad([random_ids(n) for n in LENS], shift=None)
    labels = ids.where(mask.bool(), -100)
    labels[0, 3] = -100

    output = model(ids, attention_mask=mask, labels=labels)

    expected = cross_entropy(
        output.logits[:, :-1].flatten(0, 1),
        # A row's first label follows padding.
        labels[:, 1:].where(mask[:, :-1].bool(), -100).flatten(),
        ignore_index=-100,
    )
    assert_close(output.loss, expected)

    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_of_training_has_the_auxiliary_terms(export: Export) -> None:
    model = _load(export, "moxe")
    ids = random_ids(2, 8)

    nll = model(ids, labels=ids).loss
    model.train()
    loss = model(ids, labels=ids).loss

    terms = model.model(
        ids[:, :-1],
        BatchLayout.of(ids[:, :-1]),
        ids[:, 1:],
        reduction="mean",
        return_terms=True,
    )
    assert_close(nll, terms.nll)
    assert loss > nll
    # The last token is routed too, though nothing follows it.
    assert_close(loss, terms.aggregate, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_what_the_generator_of_fairseq2_gives(
    export: Export, family: str, use_cache: bool
) -> None:
    _, folder, loaded = export(family)
    prompts = [random_ids(n) for n in LENS]
    max_gen_len = 7

    generator = SamplingSequenceGenerator(
        loaded.model,
        loaded.tokenizer.vocab_info,
        TopKSampler(1),
        max_gen_len=max_gen_len,
        echo_prompt=False,
    )
    hypotheses = [generator(*pad_seqs([p])).hypotheses[0][0].seq for p in prompts]

    load: Any = AutoTokenizer.from_pretrained
    batch = load(folder).pad({"input_ids": [p.tolist() for p in prompts]})
    inputs = {name: torch.tensor(value) for name, value in batch.items()}

    texts = _load(export, family).generate(
        **inputs,
        max_new_tokens=max_gen_len,
        do_sample=False,
        use_cache=use_cache,
        # fairseq2 never generates it.
        suppress_tokens=[loaded.tokenizer.vocab_info.pad_idx],
    )[:, WIDTH:]

    for hypothesis, text in zip(hypotheses, texts, strict=True):
        # fairseq2 ends every text, also one that is cut off.
        length = min(len(hypothesis), max_gen_len - 1)
        assert text[:length].tolist() == hypothesis[:length].tolist()

    assert max(map(len, hypotheses)) == max_gen_len


@both_recurrent
def test_beams_carry_their_states_along(export: Export, family: str) -> None:
    model = _load(export, family)
    ids, mask = _pad([random_ids(n) for n in LENS], shift=None)

    options = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 1}
    with_cache, without = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )

    assert with_cache.tolist() == without.tolist()


@both_recurrent
@torch.no_grad()
def test_the_cache_does_not_grow(export: Export, family: str) -> None:
    model = _load(export, family)
    ids = random_ids(2, 9)

    first = model(ids[:, :3], use_cache=True)
    cache = first.past_key_values
    assert isinstance(cache, RecurrentCache)
    size = cache.size_bytes()
    rest = model(ids[:, 3:], past_key_values=cache)

    assert (cache.get_seq_length(), cache.size_bytes()) == (9, size)
    logits = torch.cat([first.logits, rest.logits], dim=1)
    assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)

    # Without asking there is none, as few want one.
    assert model(ids).past_key_values is None


def test_what_cannot_be_computed_is_refused(export: Export) -> None:
    model = _load(export, "xlstm")
    ids = random_ids(2, 4)

    def mask(*rows: list[int]) -> Tensor:
        return torch.tensor(rows)

    for wrong in (mask([1, 1, 1, 1], [1, 0, 1, 1]), mask([1, 1, 1, 1], [0, 0, 0, 0])):
        with pytest.raises(ValueError, match="must have a 1 in each row and no 0"):
            model(ids, attention_mask=wrong)

    with pytest.raises(ValueError, match="must have the shape of `input_ids`"):
        model(ids, attention_mask=torch.ones(2, 3))

    with pytest.raises(ValueError, match="`padding_side` to 'left'"):
        model.generate(ids, attention_mask=mask([1, 1, 1, 1], [1, 1, 1, 0]))

    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1], assistant_model=model)

    with pytest.raises(ValueError, match="must be left out in training mode"):
        model.train()(ids, use_cache=True)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "mismatched"])
def test_auto_classes_refuse_other_parameters(
    export: Export, tmp_path: Path, problem: str
) -> None:
    folder = export("moxe").folder
    name = "model.final_proj.weight"
    state = load_file(folder / "model.safetensors")

    if problem == "missing":
        del state[name]
    elif problem == "unexpected":
        state[name := "model.more"] = torch.zeros(2)
    else:
        state[name] = torch.zeros(2, 3)

    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads(folder.joinpath("config.json").read_text())
    tmp_path.joinpath("config.json").write_text(json.dumps(config))

    load: Any = AutoModelForCausalLM.from_pretrained

    with pytest.raises(ValueError, match=f"1 {problem}: .*{name}"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_what_transformers_saves_comes_back(export: Export, tmp_path: Path) -> None:
    model = _load(export, "xlstm")

    model.save_pretrained(tmp_path)

    exported = open_exported(tmp_path)
    assert exported.family == "xlstm"
    assert exported.model_config == export("xlstm").loaded.provenance["model_config"]


@pytest.mark.usefixtures("fairseq2_setup")
def test_a_fresh_model_keeps_the_initial_weights_of_its_family() -> None:
    config = MoxEConfig({"model_dim": 32, "num_layers": 1, "vocab_size": 64})

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1)
    again = MoxEForCausalLM(config)

    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    # N(0, 1/M), where transformers would draw N(0, 0.02^2)
    std = float(model.get_input_embeddings().weight.detach().std())
    assert std == pytest.approx(32**-0.5, rel=0.1)
    assert config.vocab_size == 64
    assert config.max_position_embeddings == get_arch("moxe", "340m").max_seq_len


def test_recipes_start_from_an_exported_folder(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, folder, _ = export("gemma2")
    outputs = []

    for name, source in (("run", run_dir), ("folder", folder)):
        overrides = {
            "pretrained.source": str(source),
            "prompts": ["some text", "to learn"],
            "seq_generator.config.max_gen_len": 6,
            "common.torch.num_threads": 1,
        }
        config = load_preset("generate/greedy", overrides, recipe="lm/generate")
        run_recipe("lm/generate", config, tmp_path / name, quiet=True)
        outputs.append(tmp_path.joinpath(name, "output/rank_0.jsonl").read_text())

    assert outputs[0] == outputs[1]
    assert "some text" in outputs[0]
    assert "> to learn" in capsys.readouterr().out
