"""What happens to a batch of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TextIO, cast, final

from fairseq2.data.tokenizers import TokenDecoder
from fairseq2.datasets import SequenceBatch
from fairseq2.generation import Hypothesis, SequenceGenerator
from fairseq2.metrics import MetricBag
from fairseq2.metrics.common import (
    add_seq_generator_metrics,
    update_seq_generator_metrics,
)
from fairseq2.recipe import GeneratorUnit  # its module cannot come first
from typing_extensions import override


@final
class CompletionUnit(GeneratorUnit[SequenceBatch]):
    """Completes prompts, and writes the best completion of each.

    :param generator: Generates the tokens.
    :param decode: Turns them into text.
    :param jsonl: Gets one line per prompt: ``prompt``, ``text``, ``num_tokens``, and
        the ``score`` if the generator computes one.
    :param text: Gets the prompts and the completions for people to read, if given.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        decode: TokenDecoder,
        jsonl: TextIO,
        text: TextIO | None,
    ) -> None:
        self._generator = generator
        self._decode = decode
        self._jsonl = jsonl
        self._text = text

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        add_seq_generator_metrics(metric_bag)

    @override
    def process_batch(self, batch: SequenceBatch, metric_bag: MetricBag) -> None:
        output = self._generator(*batch.as_input())

        update_seq_generator_metrics(metric_bag, output)

        prompts = cast(Sequence[str], batch.example)

        for prompt, hypotheses in zip(prompts, output.hypotheses, strict=True):
            self._write(prompt, hypotheses[0])

    @override
    def finalize(self, metric_bag: MetricBag) -> None:
        self._jsonl.close()

    def _write(self, prompt: str, hypothesis: Hypothesis) -> None:
        text = self._decode(hypothesis.seq)

        record: dict[str, object] = {
            "prompt": prompt,
            "text": text,
            "num_tokens": len(hypothesis.seq),
        }

        if hypothesis.score is not None:
            record["score"] = float(hypothesis.score)

        self._jsonl.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._jsonl.flush()

        if self._text is not None:
            self._text.write(f"> {prompt}\n{text}\n\n")
            self._text.flush()
