"""The Gemma 2 model."""

from __future__ import annotations

from typing import final

from moxe_plugin.models.hf import HfCausalLM


@final
class Gemma2LM(HfCausalLM):
    """A Gemma 2 language model: dense, hence without auxiliary losses."""
