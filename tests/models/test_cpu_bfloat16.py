"""Training of a model in bfloat16 on a CPU, where C++ reads and writes it."""

from __future__ import annotations

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor

from moxe_plugin.nn import passes, products
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.products import rounds_to_bfloat16
from tests.models.families import RECURRENT_FAMILIES, create_model

pytestmark = pytest.mark.skipif(
    not rounds_to_bfloat16() or why_not_loaded("slstm_scan") is not None,
    reason="no products of bfloat16 in C++ here",
)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_gradients_are_as_near_to_those_of_float32_as_torchs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of these, rounding sends no token to another expert: gradients would be others.
    ids = torch.randint(4, 300, (3, 41), generator=torch.Generator().manual_seed(3))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    torch.manual_seed(3)
    values = create_model(family, dtype=torch.bfloat16).state_dict()

    def run(dtype: torch.dtype) -> tuple[float, Tensor]:
        model = create_model(family, dtype=dtype).train()
        model.load_state_dict(values)

        loss = model(inputs, BatchLayout.of(inputs), targets, reduction="mean")
        loss.backward()
        grads = [x.grad for x in model.parameters() if x.grad is not None]

        assert {x.dtype for x in grads} == {dtype}
        return loss.item(), torch.cat([x.flatten().float() for x in grads])

    expected_loss, expected = run(torch.float32)
    loss, actual = run(torch.bfloat16)
    for module in (products, passes):
        monkeypatch.setattr(module, "rounds_to_bfloat16", lambda: False)
    _, by_torch = run(torch.bfloat16)

    assert abs(loss - expected_loss) < 1e-2 * expected_loss
    error, error_of_torch = ((x - expected).norm() for x in (actual, by_torch))
    assert 0 < error < 1.5 * error_of_torch
    # bfloat16 has 8 bits, and some ten products follow each other.
    assert error < 0.1 * expected.norm()
