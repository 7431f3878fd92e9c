"""Recurrent models whose steps are captured, and texts that they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor, tensor

from moxe_plugin.models.captured_step import Replay, capture_cuda_graph
from moxe_plugin.models.captured_steps import CapturedStepsLM
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.experts import SparseExperts
from tests.common import assert_close
from tests.models.families import create_model, random_ids


class Captures:
    """Captures steps, and counts; on a CPU, what is computed anew is a replay."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, run: Callable[[], object], device: torch.device) -> Replay:
        replay = capture_cuda_graph(run, device) if device.type == "cuda" else run
        # A capture computes.
        replay()
        self.num_captured += 1

        def count() -> None:
            self.num_replayed += 1
            replay()

        return count


def create(
    family: str,
    device: torch.device,
    change: Callable[[Any], None] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[AuxLossCausalLM, CapturedStepsLM, Captures]:
    """Create a model in evaluation mode, and the same with captured steps.

    :param family: The name of the family.
    :param device: Where it is.
    :param change: Changes the configuration in place.
    :param dtype: The data type of the parameters.

    :returns: The model, that with captured steps, and what captures them.
    """
    model = create_model(family, dtype=dtype, change=change).eval().to(device)

    # The initial weights tell few tokens apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    for module in model.modules():
        if isinstance(module, SparseExperts):
            module.steps = "device"

    captures = Captures()

    return model, CapturedStepsLM(model, captures), captures


def set_backend(model: AuxLossCausalLM, backend: ScanBackend) -> None:
    """Let all modules compute with a backend.

    :param model: The model.
    :param backend: The backend.
    """
    for module in model.modules():
        if hasattr(module, "backend"):
            cast("Any", module).backend = backend


class Text:
    """Sequences that a model reads bit by bit, and what it says without a state.

    :param model: The model.
    :param num_seqs: The number of sequences.
    """

    def __init__(self, model: AuxLossCausalLM, num_seqs: int) -> None:
        self.seqs = random_ids(num_seqs, 24).to(next(model.parameters()).device)
        self.position = 0
        self.state_bag = IncrementalStateBag(100)

        with torch.no_grad():
            self.expected: Tensor = model(self.seqs, BatchLayout.of(self.seqs))

    def read(self, model: Any, num_tokens: int = 1) -> None:
        """Have a model read on, and compare.

        :param model: The model, or one with captured steps.
        :param num_tokens: How many tokens.
        """
        positions = slice(self.position, self.position + num_tokens)
        seqs = self.seqs[:, positions]

        logits = model(seqs, BatchLayout.of(seqs), state_bag=self.state_bag)

        assert_close(logits, self.expected[:, positions], rtol=1e-4, atol=1e-4)

        self.state_bag.increment_step_nr(num_tokens)
        self.position += num_tokens

    def reorder(self, rows: list[int]) -> None:
        """Keep some of the sequences.

        :param rows: Which, in which order.
        """
        order = tensor(rows, device=self.seqs.device)

        self.seqs, self.expected = self.seqs[order], self.expected[order]
        self.state_bag.reorder(order)
