"""Training under autocast on a CPU, where C++ rounds factors of products."""

from __future__ import annotations

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor

from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.products import rounds_to_bfloat16
from tests.models.families import RECURRENT_FAMILIES, create_model

pytestmark = pytest.mark.skipif(
    not rounds_to_bfloat16() or why_not_loaded("slstm_scan") is not None,
    reason="no products of bfloat16 in C++ here",
)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_gradients_are_those_of_float32_but_for_rounding(family: str) -> None:
    torch.manual_seed(1)
    model = create_model(family, dtype=torch.float32).train()
    ids = torch.randint(4, 300, (3, 41))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    dtypes: set[torch.dtype] = set()

    def note_dtype(_: object, __: object, output: object) -> None:
        dtypes.update(x.dtype for x in _find_tensors(output))

    for module in model.modules():
        module.register_forward_hook(note_dtype)

    def run(*, rounds: bool) -> tuple[float, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            loss = model(inputs, BatchLayout.of(inputs), targets, reduction="mean")
        loss.backward()
        grads = [x.grad for x in model.parameters() if x.grad is not None]

        return loss.item(), torch.cat([x.flatten() for x in grads])

    expected_loss, expected = run(rounds=False)
    loss, actual = run(rounds=True)

    assert 0 < abs(loss - expected_loss) < 1e-2 * expected_loss
    # bfloat16 has 8 bits, and some ten products follow each other.
    assert 0 < (actual - expected).norm() < 0.05 * expected.norm()
    # What products make is not rounded.
    assert torch.bfloat16 not in dtypes


def _find_tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [x for part in output for x in _find_tensors(part)]

    return []
