"""Tests of `moxe_plugin.models.captured_steps`.

On a CPU, a step that is computed anew in the same tensors stands for a CUDA graph.
"""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor, tensor

from moxe_plugin.models.recurrent_state import (
    RecurrentState,
    count_state_bytes,
    fork_states,
)
from moxe_plugin.nn.backend import ScanBackend
from tests.common import assert_close
from tests.models.captured_cases import Text, create, set_backend
from tests.models.families import RECURRENT_FAMILIES, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

both = pytest.mark.parametrize("family", RECURRENT_FAMILIES)


@both
@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        (torch.no_grad, "auto"),
        (torch.inference_mode, "auto"),
        (torch.inference_mode, "triton"),
    ],
)
def test_steps_are_those_of_the_model(
    family: str, mode: Any, backend: ScanBackend, device: torch.device
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")

    model, captured, captures = create(family, device)
    text = Text(model, 3)

    with mode():
        text.read(captured, 5)

        set_backend(model, backend)

        state_bytes = count_state_bytes(model, text.state_bag)

        for _ in range(6):
            text.read(captured)

        # By the model itself, and then captured again
        text.read(model)
        text.read(captured, 3)
        text.read(captured)

    assert (captures.num_captured, captures.num_replayed) == (1, 7)
    assert count_state_bytes(model, text.state_bag) == state_bytes


@both
def test_rows_may_end_and_be_reordered(family: str, device: torch.device) -> None:
    model, captured, captures = create(family, device)
    text = Text(model, 5)

    with torch.inference_mode():
        text.read(captured, 4)
        text.read(captured)
        text.reorder([4, 0, 1, 3, 2])
        text.read(captured)
        text.reorder([3, 1, 0])
        text.read(captured)
        text.read(captured)
        text.reorder([2])
        text.read(captured)

    # For 8, 4 and 1 sequences.
    assert (captures.num_captured, captures.num_replayed) == (3, 5)


@both
def test_texts_may_take_turns(family: str, device: torch.device) -> None:
    model, captured, captures = create(family, device)
    texts = [Text(model, 2) for _ in range(3)]

    with torch.inference_mode():
        for text in texts:
            text.read(captured, 4)

        for _ in range(3):
            for text in texts:
                text.read(captured)
                text.read(captured)

    assert (captures.num_captured, captures.num_replayed) == (1, 18)


@both
def test_a_fork_is_left_alone(family: str, device: torch.device) -> None:
    model, captured, _ = create(family, device)
    text = Text(model, 2)

    with torch.inference_mode():
        text.read(captured, 4)
        text.read(captured)

        rows = tensor([0, 1], device=device)
        fork = fork_states(model, text.state_bag, rows)

        text.read(captured)
        text.read(captured)

        text.state_bag, text.position = fork, 5
        text.read(captured)
        text.read(captured)


def test_a_text_that_is_given_up_is_forgotten(device: torch.device) -> None:
    model, captured, _ = create("moxe", device)

    with torch.inference_mode():
        for _ in range(2):
            text = Text(model, 2)
            text.read(captured, 2)
            text.read(captured)

            given_up = ref(text.state_bag)
            del text
            gc.collect()

            assert given_up() is None


@both
@pytest.mark.parametrize("num_seqs", [3, 4])
def test_states_that_others_replaced_count(
    family: str, num_seqs: int, device: torch.device
) -> None:
    model, captured, _ = create(family, device)
    first, second = Text(model, num_seqs), Text(model, num_seqs)

    with torch.inference_mode():
        for text in (first, second):
            text.read(captured, 3)

        first.read(captured)
        # Some of the states stay in the memory of the steps.
        first.read(model)
        second.read(captured)
        first.read(captured)

        # One state is another object, of the same numbers.
        module = next(
            m
            for m in model.modules()
            if first.state_bag.maybe_get_state(m, RecurrentState)
        )
        state = first.state_bag.maybe_get_state(module, RecurrentState)
        assert state is not None
        first.state_bag.set_state(module, state.map(lambda x, _: x.clone()))
        second.read(captured)
        first.read(captured)
        second.read(captured)


def test_a_step_does_not_depend_on_the_texts_before(device: torch.device) -> None:
    # Of one token, the window of a convolution keeps the type that it began with.
    model, captured, _ = create("xlstm", device, dtype=torch.bfloat16)
    seqs = random_ids(1, 6).to(device)
    results = []

    with torch.inference_mode():
        for runner, begins in ((model, [1]), (captured, [3, 1])):
            for begin in begins:
                state_bag = IncrementalStateBag(10)
                runner(
                    seqs[:, :begin],
                    BatchLayout.of(seqs[:, :begin]),
                    state_bag=state_bag,
                )
                step = seqs[:, begin : begin + 1]
                logits = runner(step, BatchLayout.of(step), state_bag=state_bag)

            results.append(logits)

    assert torch.equal(*results)


def test_another_number_of_sequences_is_an_error(device: torch.device) -> None:
    model, captured, _ = create("moxe", device)
    text = Text(model, 3)
    seqs = random_ids(4, 1).to(device)

    with torch.inference_mode():
        text.read(captured, 2)
        text.read(captured)

        with pytest.raises(ValueError, match=r"^`seqs` must have as many sequences"):
            captured(seqs, BatchLayout.of(seqs), state_bag=text.state_bag)


@both
def test_all_else_is_the_models(family: str, device: torch.device) -> None:
    model, captured, captures = create(family, device)
    seqs = random_ids(2, 6).to(device)
    layout = BatchLayout.of(seqs)

    assert_close(captured(seqs, layout), model(seqs, layout))
    assert_close(
        captured(seqs, layout, seqs, reduction="mean"),
        model(seqs, layout, seqs, reduction="mean"),
    )

    # A step with gradients, and one without a state
    state_bag = IncrementalStateBag(10)
    captured(seqs, layout, state_bag=state_bag)
    captured(seqs[:, :1], BatchLayout.of(seqs[:, :1]), state_bag=state_bag)

    with torch.no_grad():
        text = Text(model, 2)
        text.read(captured)

    assert captures.num_captured == 0
    assert captured.max_seq_len == model.max_seq_len


def test_parameters_that_moved_are_captured_again(device: torch.device) -> None:
    model, captured, captures = create("moxe", device)
    text = Text(model, 2)

    with torch.no_grad():
        text.read(captured, 3)
        text.read(captured)

        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

        text.read(captured)
        text.read(captured)

    assert (captures.num_captured, captures.num_replayed) == (2, 3)


def test_autocast_has_a_graph_of_its_own(device: torch.device) -> None:
    model, captured, captures = create("moxe", device)
    seqs = random_ids(2, 5).to(device)
    results = []

    for runner in (model, captured):
        state_bag = IncrementalStateBag(10)

        def step(
            begin: int, end: int, runner: Any = runner, state_bag: Any = state_bag
        ) -> Tensor:
            part = seqs[:, begin:end]
            logits: Tensor = runner(part, BatchLayout.of(part), state_bag=state_bag)

            return logits

        with torch.no_grad():
            step(0, 2)
            plain = step(2, 3)
            with torch.autocast(device.type, torch.bfloat16):
                results.append([plain, step(3, 4), step(4, 5)])

    for actual, expected in zip(*results, strict=True):
        assert_close(actual.float(), expected.float(), rtol=1e-4, atol=1e-4)

    assert (captures.num_captured, captures.num_replayed) == (2, 3)


def test_autocast_keeps_no_copies_of_parameters_in_a_graph(
    device: torch.device,
) -> None:
    model, captured, _ = create("xlstm", device)
    text = Text(model, 2)
    caches = []

    with torch.no_grad():
        text.read(captured, 2)

        model.register_forward_pre_hook(
            lambda *_: caches.append(torch.is_autocast_cache_enabled())
        )
        step = text.seqs[:, 2:3]
        with torch.autocast(device.type, torch.bfloat16):
            captured(step, BatchLayout.of(step), state_bag=text.state_bag)

    assert caches
    assert not any(caches)
