"""Systems are told apart by their configuration."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from moxe_plugin.claims.systems import LABELS, name_system
from tests.models.families import FAMILIES, get_arch

pytestmark = pytest.mark.usefixtures("fairseq2_setup")


@pytest.mark.parametrize("size", ["tiny", "quickstart", "small", "340m"])
@pytest.mark.parametrize("system", [name for name in LABELS if name.startswith("moxe")])
def test_architectures_have_the_names_of_systems(system: str, size: str) -> None:
    config = get_arch("moxe", system.replace("moxe", size, 1))

    assert name_system("moxe", asdict(config)) == system


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_are_named_as_their_family(family: str) -> None:
    assert name_system(family, asdict(get_arch(family, "tiny"))) == family


def test_an_ablation_without_memory_is_a_system_of_its_own() -> None:
    config = get_arch("moxe", "tiny_gamma0_token")

    assert name_system("moxe", asdict(config)) == "moxe_gamma0_token"
