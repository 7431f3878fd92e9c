"""fairseq2's own generators, on every family."""

from __future__ import annotations

import pytest
import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSequenceGenerator
from fairseq2.generation.sampling import SamplingSequenceGenerator, TopKSampler
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import log_softmax

from moxe_plugin.models.clm import AuxLossCausalLM
from tests.common import BOS_IDX, EOS_IDX, PAD_IDX, VOCAB_SIZE, assert_close
from tests.models.families import FAMILIES, create_model, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

all_families = pytest.mark.parametrize("family", FAMILIES)

VOCAB_INFO = VocabularyInfo(
    VOCAB_SIZE, unk_idx=None, bos_idx=BOS_IDX, eos_idx=EOS_IDX, pad_idx=PAD_IDX
)

PROMPT_LENS = [7, 4, 5]

MAX_GEN_LEN = 6


def _create(family: str) -> AuxLossCausalLM:
    model = create_model(family).eval()

    # The initial weights tell few tokens apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    return model


def _score_tokens(model: AuxLossCausalLM, seq: Tensor) -> Tensor:
    """Compute the log-probability of each token but the first, without a state."""
    inputs = seq[:-1].unsqueeze(0)

    with torch.no_grad():
        logits: Tensor = model(inputs, BatchLayout.of(inputs))

    log_probs = log_softmax(logits[0], dim=-1, dtype=torch.float32)

    return log_probs.gather(1, seq[1:].unsqueeze(1)).squeeze(1)


def _complete_greedily(model: AuxLossCausalLM, prompt: Tensor, seq_len: int) -> Tensor:
    """Append the most probable token until there is EOS, which comes last."""
    seq = prompt.unsqueeze(0)

    while seq.size(1) < seq_len - 1:
        with torch.no_grad():
            logits: Tensor = model(seq, BatchLayout.of(seq))

        logits[..., PAD_IDX] = -torch.inf
        # The generator wants a token from every prompt of the batch.
        if seq.size(1) < max(PROMPT_LENS):
            logits[..., EOS_IDX] = -torch.inf

        best = logits[:, -1:].argmax(dim=-1)
        seq = torch.cat([seq, best], dim=1)

        if int(best) == EOS_IDX:
            return seq[0]

    return torch.cat([seq[0], torch.tensor([EOS_IDX])])


@all_families
@pytest.mark.parametrize("num_gens", [1, 2])
@pytest.mark.parametrize("prefill_chunk_size", [None, 2])
def test_greedy_sampling_is_the_argmax_of_the_full_forward(
    family: str, prefill_chunk_size: int | None, num_gens: int
) -> None:
    model = _create(family)
    prompts = random_ids(3, max(PROMPT_LENS))

    generator = SamplingSequenceGenerator(
        model,
        VOCAB_INFO,
        TopKSampler(1),
        num_gens=num_gens,
        max_gen_len=MAX_GEN_LEN,
        echo_prompt=True,
        prefill_chunk_size=prefill_chunk_size,
    )
    output = generator(prompts, BatchLayout.of(prompts, PROMPT_LENS))

    for prompt, prompt_len, hypotheses in zip(
        prompts, PROMPT_LENS, output.hypotheses, strict=True
    ):
        # Generation ends where the longest prompt has `MAX_GEN_LEN` tokens more.
        expected = _complete_greedily(
            model, prompt[:prompt_len], max(PROMPT_LENS) + MAX_GEN_LEN
        )

        assert len(hypotheses) == num_gens
        for hypothesis in hypotheses:
            assert hypothesis.seq.tolist() == expected.tolist()


@all_families
def test_states_follow_their_samples(family: str) -> None:
    model = _create(family)
    prompts = random_ids(2, 5)

    generator = SamplingSequenceGenerator(
        model,
        VOCAB_INFO,
        TopKSampler(50),
        num_gens=3,
        max_gen_len=MAX_GEN_LEN,
        echo_prompt=True,
        compute_scores=True,
        temperature=1.0,
    )
    output = generator(prompts, BatchLayout.of(prompts))

    hypotheses = [h for group in output.hypotheses for h in group]
    assert len({tuple(h.seq.tolist()) for h in hypotheses}) > 3

    for hypothesis in hypotheses:
        assert hypothesis.step_scores is not None

        assert_close(
            hypothesis.step_scores[1:].log(),
            _score_tokens(model, hypothesis.seq),
            rtol=0.0,
            atol=1e-4,
        )


@all_families
def test_states_follow_their_beams(family: str) -> None:
    model = _create(family)
    prompts = random_ids(3, max(PROMPT_LENS))

    generator = BeamSearchSequenceGenerator(
        model,
        VOCAB_INFO,
        beam_size=4,
        max_gen_len=MAX_GEN_LEN,
        echo_prompt=True,
        prefill_chunk_size=2,
    )
    output = generator(prompts, BatchLayout.of(prompts, PROMPT_LENS))

    for prompt, prompt_len, hypotheses in zip(
        prompts, PROMPT_LENS, output.hypotheses, strict=True
    ):
        assert len({tuple(h.seq.tolist()) for h in hypotheses}) == len(hypotheses) > 1

        for hypothesis in hypotheses:
            assert hypothesis.seq[:prompt_len].tolist() == prompt[:prompt_len].tolist()
            assert hypothesis.score is not None

            # Of the whole sequence, over its length without the first token.
            expected = _score_tokens(model, hypothesis.seq).mean()
            assert_close(hypothesis.score, expected, rtol=0.0, atol=1e-4)
