"""Checks that fairseq2 knows everything of this package."""

from __future__ import annotations

import pytest
from fairseq2.assets import AssetStore
from fairseq2.data.tokenizers import TokenizerFamily
from fairseq2.datasets import DatasetFamily
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import get_dependency_resolver

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


@pytest.mark.parametrize(
    ("family", "arch"),
    [("moxe", "340m"), ("xlstm", "338m"), ("gemma2", "356m"), ("qwen_moe", "350m")],
)
def test_model_family_has_its_architectures(family: str, arch: str) -> None:
    model_family = get_dependency_resolver().resolve(ModelFamily, key=family)

    for name in ("tiny", "quickstart", arch):
        assert model_family.maybe_get_arch_config(name) is not None


def test_data_families_are_known() -> None:
    resolver = get_dependency_resolver()

    for name in ("moxe_tokens", "moxe_instructions"):
        assert resolver.resolve(DatasetFamily, key=name).name == name

    assert resolver.resolve(TokenizerFamily, key="moxe_hg").name == "moxe_hg"


@pytest.mark.parametrize(
    "name",
    ["moxe_embedded", "moxe_embedded_instructions", "moxe_embedded_tokenizer"],
)
def test_asset_cards_are_known(name: str) -> None:
    store = get_dependency_resolver().resolve(AssetStore)

    assert store.maybe_retrieve_card(name) is not None
