"""Draws requests: neither their order nor batches nor sharing changes a score."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moxe_plugin.eval.adapter import LoadedModelLM
from tests.eval.conftest import Load
from tests.eval.requests import make_requests
from tests.eval.test_adapter import direct_score

# Few letters: many requests begin alike, or are the same.
_texts = st.text(alphabet="ab ü", max_size=12)

_pairs = st.tuples(_texts, _texts.filter(lambda text: text != ""))


@pytest.mark.parametrize("family", ["moxe", "xlstm"])
@settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(_pairs, min_size=1, max_size=6),
    batch_size=st.sampled_from([1, 2, 5, "auto"]),
    share_prefixes=st.booleans(),
    data=st.data(),
)
def test_score_is_that_of_the_request_alone(
    load: Load,
    family: str,
    pairs: list[tuple[str, str]],
    batch_size: int | str,
    share_prefixes: bool,
    data: st.DataObject,
) -> None:
    loaded = load(family)

    order = data.draw(st.permutations(range(len(pairs))))

    lm = LoadedModelLM(loaded, batch_size=batch_size, share_prefixes=share_prefixes)

    requests: list[Any] = make_requests("loglikelihood", *(pairs[i] for i in order))
    scores = lm.loglikelihood(requests, disable_tqdm=True)

    for idx, (logprob, is_greedy) in zip(order, scores, strict=True):
        context, continuation = pairs[idx]

        # The harness has a rule for spaces at the end of a context.
        ids = lm._encode_pair(context, continuation) if context else ([], None)

        expected, expected_is_greedy = direct_score(
            loaded,
            ids[0] or [lm.prefix_token_id],
            ids[1] or lm.tok_encode(continuation),
        )

        assert logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert is_greedy == expected_is_greedy
