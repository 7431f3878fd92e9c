"""What the machine allows; nothing here depends on how fast it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq2.nn import StandardEmbedding, TiedProjection
from torch import nn

from moxe_plugin.nn import products
from moxe_plugin.speed import limits
from moxe_plugin.speed.limits import (
    least_memory_seconds,
    list_products,
    measure_limits,
    new_gradient_seconds,
)
from moxe_plugin.speed.options import MeasureOptions
from tests.models.families import FAMILIES, create_model

_CPU = torch.device("cpu")


def test_every_library_multiplies() -> None:
    lhs, rhs = torch.randn(5, 7), torch.randn(7, 3)

    listed = list_products(torch.float32, _CPU)

    assert next(iter(listed)) == "torch"
    for product in listed.values():
        with torch.no_grad():
            torch.testing.assert_close(product(lhs, rhs), lhs @ rhs)


@pytest.mark.parametrize("reason", [None, "it rains"], ids=["ours", "torch"])
def test_our_products_are_measured_where_they_run(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: reason)

    assert ("moxe_plugin" in list_products(torch.float32, _CPU)) == (reason is None)


@pytest.mark.parametrize("multiplies", [True, False], ids=["ours", "torch"])
def test_our_products_of_bfloat16_are_measured_where_they_run(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: None)
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: multiplies)

    assert ("moxe_plugin" in list_products(torch.bfloat16, _CPU)) == multiplies


def test_onednn_is_measured_where_torch_has_it() -> None:
    has_onednn = torch.backends.mkldnn.is_available()

    assert ("onednn" in list_products(torch.float32, _CPU)) == has_onednn
    assert "onednn" not in list_products(torch.bfloat16, _CPU)


def test_peak_is_that_of_the_fastest_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"slow": 3.0, "fast": 5.0}
    monkeypatch.setattr(limits, "list_products", lambda *_: {n: n for n in rates})
    monkeypatch.setattr(limits, "measure_matmul", lambda *args: rates[args[-1]])

    measured = measure_limits(MeasureOptions(device=_CPU, copy_bytes=64))

    assert measured["matmul_by_library"] == {"bfloat16": rates, "float32": rates}
    assert measured["matmul_gflop_per_s"] == {"bfloat16": 5.0, "float32": 5.0}


@pytest.mark.parametrize(("memory", "expected"), [(2**20, 2**16), (2**40, 2**17)])
def test_a_copy_takes_a_part_of_a_small_machine_only(
    memory: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measure(size: int, _: torch.device) -> float:
        sizes.append(size)

        return 2.0

    monkeypatch.setattr(limits, "_count_memory", lambda _: memory)
    monkeypatch.setattr(limits, "measure_copy", measure)

    options = MeasureOptions(device=_CPU, matmul_size=4, copy_bytes=2**17)
    measured = measure_limits(options)

    assert sizes == [expected]
    assert (measured["copy_bytes"], measured["copy_gb_per_s"]) == (expected, 2.0)
    assert measured["new_memory_gb_per_s"] > 0.0


def _model(*, tied: bool) -> nn.Module:
    embed = StandardEmbedding(10, 4)
    projection: Any = nn.Linear(4, 10, bias=False)
    if tied:
        projection = TiedProjection(embed.weight, None)

    return nn.Sequential(embed, nn.Linear(4, 4, dtype=torch.bfloat16), projection)


@pytest.mark.parametrize(
    ("tied", "moved"),
    # float32: 4 bytes, bfloat16: 2. The linear layer has 4 * 4 + 4 parameters.
    [(True, 3 * 160 + 3 * 40), (False, 160 + 3 * 160 + 3 * 40)],
    ids=["tied", "untied"],
)
def test_weights_are_moved_three_times_and_looked_up_tables_once(
    tied: bool, moved: int
) -> None:
    measured = {"copy_gb_per_s": 2e-9, "new_memory_gb_per_s": 4e-9}
    model = _model(tied=tied)

    # GB/s of 1e9 bytes: 2 and 4 bytes a second.
    assert least_memory_seconds(model, measured) == pytest.approx(moved / 2)
    assert new_gradient_seconds(model, measured) == pytest.approx(
        ((160 if tied else 320) + 40) / 4
    )


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_table_of_the_embedding_is_not_read(family: str) -> None:
    model = create_model(family, dtype=torch.float32)
    tables = [
        p
        for name, p in model.named_parameters(remove_duplicate=False)
        if "embed" in name
    ]
    others = [
        p
        for name, p in model.named_parameters(remove_duplicate=False)
        if "embed" not in name
    ]
    once = sum(t.numel() for t in tables if all(t is not p for p in others))
    thrice = sum(p.numel() for p in {id(p): p for p in others}.values())

    assert least_memory_seconds(model, {"copy_gb_per_s": 4e-9}) == pytest.approx(
        once + 3 * thrice
    )
