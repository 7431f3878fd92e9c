"""Fixtures of the routing page's tests: random models that read bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moxe_plugin.eval.checkpoints import LoadedModel
from moxe_plugin.routing_page.view import RoutingView, create_view
from tests.common import ByteTokenizer
from tests.models.families import create_model

HOSTILE_TEXT = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> "
    "</script><!-- & -->\n\t\"double\" 'single' {{ 7 * 7 }} ${x} \\u003c\u2028é日🙂"
    "\x00\r\n\u202eesrever $a_b$"
)

Read = Callable[..., RoutingView]


@pytest.fixture(scope="session")
def load_byte_model(
    fairseq2_setup: None,  # noqa: ARG001  # fixtures cannot use `usefixtures`
) -> Callable[[str], LoadedModel]:
    """Return a function that makes a tiny random MoxE by architecture, once."""
    models: dict[str, LoadedModel] = {}

    def load(arch: str) -> LoadedModel:
        if arch not in models:
            torch.manual_seed(2)
            model = create_model("moxe", arch, dtype=torch.float32)

            # Sharper predictions than a fresh model's, so that tokens differ.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(3.0)

            models[arch] = LoadedModel(
                model.eval(), ByteTokenizer(), f"a/{arch}", 7, {"model_family": "moxe"}
            )

        return models[arch]

    return load


@pytest.fixture
def read(load_byte_model: Callable[[str], LoadedModel]) -> Read:
    """Return a function that lets a tiny MoxE read a text."""

    def read(text: str, arch: str = "tiny", *, max_tokens: int = 1024) -> RoutingView:
        return create_view(load_byte_model(arch), text, max_tokens=max_tokens)

    return read
