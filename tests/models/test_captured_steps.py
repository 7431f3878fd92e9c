"""Tests of `moxe_plugin.models.captured_steps`.

On a CPU, a step that is computed anew in the same tensors stands for a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor, tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moxe_plugin.models.captured_step import capture_cuda_graph
from moxe_plugin.models.captured_steps import CapturedStepsLM, capture_steps
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.recurrent_state import count_state_bytes, fork_states
from moxe_plugin.nn.experts import SparseExperts
from tests.common import assert_close
from tests.models.families import RECURRENT_FAMILIES, create_model, random_ids

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

both = pytest.mark.parametrize("family", RECURRENT_FAMILIES)


class Captures:
    """Captures steps, and counts."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], object]:
        replay = capture_cuda_graph(run) if torch.cuda.is_available() else run
        self.num_captured += 1

        def count() -> None:
            self.num_replayed += 1
            replay()

        return count


def create(
    family: str, device: torch.device, change: Callable[[Any], None] | None = None
) -> tuple[AuxLossCausalLM, CapturedStepsLM, Captures]:
    model = create_model(family, dtype=torch.float32, change=change).eval().to(device)

    # The initial weights tell few tokens apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    for module in model.modules():
        if isinstance(module, SparseExperts):
            module.steps = "device"

    captures = Captures()

    return model, CapturedStepsLM(model, captures), captures


class Text:
    """Sequences that a model reads bit by bit, and what it says without a state."""

    def __init__(self, model: AuxLossCausalLM, num_seqs: int) -> None:
        self.seqs = random_ids(num_seqs, 24).to(next(model.parameters()).device)
        self.position = 0
        self.state_bag = IncrementalStateBag(100)

        with torch.no_grad():
            self.expected: Tensor = model(self.seqs, BatchLayout.of(self.seqs))

    def read(self, model: Any, num_tokens: int = 1) -> None:
        """Have a model read on, and compare."""
        positions = slice(self.position, self.position + num_tokens)
        seqs = self.seqs[:, positions]

        logits = model(seqs, BatchLayout.of(seqs), state_bag=self.state_bag)

        assert_close(logits, self.expected[:, positions], rtol=1e-4, atol=1e-4)

        self.state_bag.increment_step_nr(num_tokens)
        self.position += num_tokens

    def reorder(self, rows: list[int]) -> None:
        """Keep some of the sequences."""
        order = tensor(rows, device=self.seqs.device)

        self.seqs, self.expected = self.seqs[order], self.expected[order]
        self.state_bag.reorder(order)


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
    family: str, mode: Any, backend: str, device: torch.device
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")

    model, captured, captures = create(family, device)
    text = Text(model, 3)

    with mode():
        text.read(captured, 5)

        for module in model.modules():
            if hasattr(module, "backend"):
                cast("Any", module).backend = backend

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
        for _ in range(3):
            text = Text(model, 2)
            text.read(captured, 2)
            text.read(captured)

            del text


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


@pytest.mark.parametrize("selection", ["top_k", "dynamic", "global_workspace"])
@pytest.mark.parametrize(
    ("experts", "expert_state"),
    [("xlstm", "subsequence"), ("xlstm", "token"), ("ffn", "token")],
)
def test_a_step_asks_nothing_of_the_device(
    experts: str, expert_state: str, selection: str
) -> None:
    def change(config: Any) -> None:
        config.experts = experts
        config.expert_state = expert_state
        config.expert_selection = selection

    with FakeTensorMode():
        model, _, _ = create("moxe", torch.device("cpu"), change)
        seqs = torch.ones(2, 1, dtype=torch.int64)

        with torch.no_grad():
            state_bag = IncrementalStateBag(10)
            for _ in range(2):
                logits = model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

    assert isinstance(logits, FakeTensor)
    assert logits.shape[:2] == seqs.shape


def test_only_recurrent_models_on_a_gpu_are_captured() -> None:
    for family in ("moxe", "gemma2"):
        model = create_model(family)

        assert capture_steps(model) is model
