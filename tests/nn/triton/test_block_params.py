"""Tests of `moxe_plugin.nn.triton.block_params`."""

from __future__ import annotations

import torch
from torch import bfloat16, float32

from moxe_plugin.nn.triton.block_params import stack_params, unstack_grads


def test_parameters_are_converted_together(device: torch.device) -> None:
    torch.manual_seed(1)
    # The second is of the type already, the third no multiple of 16 bytes.
    params = [
        torch.randn(16),
        torch.randn(8).to(bfloat16),
        torch.randn(3),
        torch.randn(40, 8).t(),
        torch.randn(2, 12),
    ]
    params = [x.to(device) for x in params]

    stacked = stack_params(params, bfloat16, [3])

    assert stacked[1] is params[1]
    assert stacked[3].shape == (1, 8, 40)
    for actual, param in zip(stacked, params, strict=True):
        assert actual.dtype == bfloat16
        assert actual.is_contiguous()
        assert torch.equal(actual.view(param.shape), param.to(bfloat16))
        assert actual.data_ptr() % 16 == 0
    # What can be is in one buffer.
    buffers = {x.untyped_storage().data_ptr() for x in (stacked[i] for i in (0, 3, 4))}
    assert len(buffers) == 1


def test_those_of_a_bank_stay_as_they_are() -> None:
    params = [torch.randn(2, 16), torch.randn(2, 4, 8)]

    stacked = stack_params(params, float32, [1])

    assert all(x is y for x, y in zip(stacked, params, strict=True))


def test_gradients_get_the_form_of_parameters() -> None:
    grads = [torch.randn(1, 4, 8).to(bfloat16), torch.randn(16)]
    params = [(float32, torch.Size([4, 8])), (float32, torch.Size([16]))]

    first, second = unstack_grads(grads, params)

    assert (first.dtype, first.shape) == params[0]
    assert torch.equal(first, grads[0][0].float())
    assert second is grads[1]
