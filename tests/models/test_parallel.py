"""Training on several processes, and what fairseq2 does to a model before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from fairseq2.error import NotSupportedError
from fairseq2.gang import (
    FakeGang,
    Gangs,
    create_fake_gangs,
    create_fsdp_gangs,
)
from fairseq2.nn import BatchLayout
from fairseq2.nn.ddp import to_ddp
from fairseq2.nn.fsdp import FSDPWrapper, to_fsdp2
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from moxe_plugin.models.clm import AuxLossCausalLM, LossTerms
from tests.common import assert_close
from tests.models.families import (
    FAMILIES,
    RECURRENT_FAMILIES,
    create_model,
    get_arch,
    get_family,
    random_ids,
)
from tests.processes import make_gangs, run_processes

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

NUM_PROCESSES = 2

CPU = torch.device("cpu")


def _compute_aggregate(model: Module, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)

    # Two tokens reach at most four of a layer's experts.
    shape, seq_lens = ((1, 2), [2]) if rank == 1 else ((3, 9), [9, 4, 1])
    seqs = torch.randint(3, 256, shape, generator=generator)

    terms = model(seqs, BatchLayout.of(seqs, seq_lens), seqs, return_terms=True)
    assert isinstance(terms, LossTerms)

    return terms.aggregate


def _compute_gradients(family: str) -> dict[str, Tensor]:
    model = _create(family)

    for rank in range(NUM_PROCESSES):
        torch.autograd.backward(_compute_aggregate(model, rank))

    return {n: _full(p.grad) for n, p in model.named_parameters()}


def _create(family: str) -> AuxLossCausalLM:
    torch.manual_seed(2)

    return create_model(family).train()


def _full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _with_fsdp(
    granularity: str, every_nth_layer: int | None, model: Module, gangs: Gangs
) -> Module:
    family = next(f for f in map(get_family, FAMILIES) if isinstance(model, f.kls))

    if every_nth_layer is not None:
        model = family.apply_layerwise_ac(model, every_nth_layer=every_nth_layer)

    def apply(module: Module, wrapper: FSDPWrapper) -> Module:
        if granularity == "model":
            return module

        return family.apply_fsdp(module, granularity, wrapper)

    return to_fsdp2(model, gangs, apply)


_Wrap = Callable[[Module, Gangs], Module]

MODES: dict[str, _Wrap] = {
    "ddp": to_ddp,
    "fsdp-stack": partial(_with_fsdp, "stack", None),
    "fsdp-model": partial(_with_fsdp, "model", None),
    "fsdp-layer-checkpointed": partial(_with_fsdp, "layer", 1),
}


def _train_in_every_mode() -> None:
    ddp_gangs = make_gangs()
    fsdp_gangs = create_fsdp_gangs(ddp_gangs)

    rank = ddp_gangs.root.rank

    for family in FAMILIES:
        expected = _compute_gradients(family)

        for mode, wrap in MODES.items():
            model = _create(family)
            keys = list(model.state_dict())

            dp_model = wrap(model, ddp_gangs if mode == "ddp" else fsdp_gangs)

            # Parameters without a gradient make the second step fail.
            for _ in range(2):
                model.zero_grad()
                torch.autograd.backward(_compute_aggregate(dp_model, rank))

            assert list(model.state_dict()) == keys, (family, mode)

            for name, parameter in model.named_parameters():
                name = name.replace("_checkpoint_wrapped_module.", "")

                # Both average over processes.
                torch.testing.assert_close(
                    _full(parameter.grad) * NUM_PROCESSES,
                    expected[name],
                    rtol=1e-5,
                    atol=1e-7,
                    msg=lambda msg, where=(family, mode, name): f"{where}: {msg}",  # type: ignore[misc]  # bound
                )


def test_gradients_of_two_processes_are_those_of_one() -> None:
    run_processes(NUM_PROCESSES, _train_in_every_mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallelism_is_refused(family: str) -> None:
    gangs = replace(create_fake_gangs(CPU), tp=FakeGang(CPU, size=2))

    with pytest.raises(
        NotSupportedError,
        match=rf"^`gang\.tensor_parallel_size` must be 1 for family '{family}', which "
        r"has no tensor parallelism yet, but is 2 instead\.$",
    ):
        get_family(family).create_new_model(
            get_arch(family, "tiny"),
            gangs,
            torch.float32,
            meta=False,
            init_rank0_only=False,
        )


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_checkpointed_and_compiled_layers_compute_the_same(family: str) -> None:
    model = create_model(family).train()
    seqs = random_ids(2, 9)

    def run() -> tuple[list[str], Tensor, list[Tensor]]:
        model.zero_grad()
        loss: Tensor = model(seqs, BatchLayout.of(seqs, [9, 4]), seqs)
        torch.autograd.backward(loss)

        grads = [_full(p.grad) for p in model.parameters()]

        return list(model.state_dict()), loss, grads

    keys, loss, grads = run()

    get_family(family).apply_layerwise_ac(model, every_nth_layer=1)
    get_family(family).compile(model, backend="eager")
    actual_keys, actual_loss, actual_grads = run()

    assert actual_keys == keys
    assert_close(actual_loss, loss)
    torch.testing.assert_close(actual_grads, grads)


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_fsdp_wraps_layers_or_the_stack(family: str) -> None:
    wrapped: list[Module] = []

    def wrapper(module: Module, reshard_after_forward: bool | None = None) -> Module:
        assert not reshard_after_forward
        wrapped.append(module)

        return module

    model = create_model(family)
    get_family(family).apply_fsdp(model, "layer", wrapper)
    assert wrapped == list(model.get_submodule("decoder.layers").children())

    wrapped.clear()
    get_family(family).apply_fsdp(model, "stack", wrapper)
    assert wrapped == [model.get_submodule("decoder")]

    with pytest.raises(
        NotSupportedError, match="`granularity` must be 'layer' or 'stack', but is 'h"
    ):
        get_family(family).apply_fsdp(model, "head", wrapper)
