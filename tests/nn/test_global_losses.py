"""Balance losses over two processes are those of the tokens of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, float64
from torch.distributed import ProcessGroup
from torch.testing import assert_close

from moxe_plugin.nn.losses import (
    LoadBalancingForm,
    group_loss,
    load_balancing_loss,
)
from tests.processes import run_processes

NUM_TOKENS: Final = [7, 4]
"""Of each process"""

WEIGHTS: Final = [3.0, 5.0]
"""Of each process's loss: its number of targets"""

MASKS: Final = [[True, True, False, True, True, True, False], [False, True, True, True]]

_Loss = Callable[[Tensor, Tensor | None, ProcessGroup | None], Tensor]


def _group(probs: Tensor, mask: Tensor | None, group: ProcessGroup | None) -> Tensor:
    return group_loss(probs, 2, mask, form="js", group=group)


def _load(form: LoadBalancingForm) -> _Loss:
    def loss(probs: Tensor, mask: Tensor | None, group: ProcessGroup | None) -> Tensor:
        indices = probs.topk(2).indices
        # Tokens differ in their number of experts.
        is_sure = probs.amax(dim=1) > 0.5
        indices[:, 1] = indices[:, 1].masked_fill(is_sure, -1)

        return load_balancing_loss(probs, indices, mask, form=form, group=group)

    return loss


LOSSES: Final = {
    "group": _group,
    "switch": _load("switch"),
    "squared": _load("squared"),
}


def _compare(name: str, has_mask: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    loss = LOSSES[name]

    logits = [torch.randn(n, 5, dtype=float64, requires_grad=True) for n in NUM_TOKENS]
    masks = [torch.tensor(m) for m in MASKS]

    expected = loss(
        torch.cat(logits).softmax(dim=-1), torch.cat(masks) if has_mask else None, None
    )
    (grad,) = torch.autograd.grad(sum(WEIGHTS) * expected, logits[rank])

    own_mask = masks[rank] if has_mask else None

    own_logits = logits[rank].detach().requires_grad_()
    own_probs = own_logits.softmax(dim=-1)

    actual = loss(own_probs, own_mask, dist.group.WORLD)
    torch.autograd.backward(WEIGHTS[rank] * actual)

    assert_close(actual, expected)
    assert_close(own_logits.grad, grad)

    # That of the process alone is another.
    assert (loss(own_probs, own_mask, None) - expected).abs() > 1e-4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("has_mask", [False, True], ids=["full", "masked"])
def test_loss_and_gradient_are_those_of_all_tokens(name: str, has_mask: bool) -> None:
    run_processes(2, _compare, name, has_mask)
