"""The Gemma 2 model."""

from __future__ import annotations

from typing import final

from fairseq2.nn import BatchLayout
from transformers.utils.generic import ModelOutput
from typing_extensions import override

from moxe_plugin.models.clm import Prediction
from moxe_plugin.models.hf import HfCausalLM


@final
class Gemma2LM(HfCausalLM):
    """A Gemma 2 language model; dense, it has no auxiliary loss."""

    @override
    def read_output(self, output: ModelOutput, seqs_layout: BatchLayout) -> Prediction:
        return Prediction(None, {}, {})
