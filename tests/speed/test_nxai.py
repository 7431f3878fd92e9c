"""Tests of `moxe_plugin.speed.nxai`."""

from __future__ import annotations

from importlib import util

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch.testing import assert_close

from moxe_plugin.models.xlstm.config import XLSTM_FAMILY
from moxe_plugin.speed.nxai import check_nxai, create_nxai_model
from moxe_plugin.speed.suites import SuiteOptions, list_cases
from tests.models.families import create_model, get_arch


@pytest.mark.usefixtures("fairseq2_setup")
def test_their_model_has_our_sizes_and_can_be_trained() -> None:
    config = get_arch("xlstm", "tiny")
    model = create_nxai_model(config, length=9)
    ours = create_model("xlstm", dtype=torch.float32)

    seqs = torch.randint(0, config.vocab_size, (2, 9))
    loss = model(seqs, BatchLayout.of(seqs), seqs, reduction="mean")
    loss.backward()

    assert loss.isfinite()
    sums = [
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, ours)
    ]
    assert_close(sums[0], sums[1], rtol=0.001, atol=0)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_of_xlstm_comes_twice_in_a_suite() -> None:
    cases = list_cases("table1", SuiteOptions(size="tiny", nxai_xlstm=True))

    [theirs] = [case for case in cases if case.implementation == "nxai"]
    assert (theirs.family, theirs.optimizer) == (XLSTM_FAMILY, False)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs `device` cpu, but it is 'cuda'"):
        check_nxai(torch.device("cuda"))

    monkeypatch.setattr(
        "moxe_plugin.speed.nxai.find_spec",
        lambda name: None if name == "xlstm" else util.find_spec(name),
    )
    with pytest.raises(ValueError, match="pip install xlstm"):
        check_nxai(torch.device("cpu"))
