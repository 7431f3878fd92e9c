"""What happens to a batch of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TextIO, cast, final

from fairseq2.data.tokenizers import TokenDecoder
from fairseq2.datasets import SequenceBatch
from fairseq2.generation import (
    Hypothesis,
    SequenceGenerator,
    SequenceGeneratorOutput,
)
from fairseq2.metrics import MetricBag
from fairseq2.metrics.common import (
    add_seq_generator_metrics,
    update_seq_generator_metrics,
)
from fairseq2.nn import BatchLayout
from fairseq2.recipe import GeneratorUnit  # its module cannot come first
from torch import Tensor
from typing_extensions import override

from moxe_plugin.train.generate.text_stream import TextStream


@final
class CompletionUnit(GeneratorUnit[SequenceBatch]):
    """Completes prompts, and writes the best completion of each.

    :param generator: Generates the tokens.
    :param decode: Turns them into text.
    :param jsonl: Gets one line per prompt: ``prompt``, ``text``, ``num_tokens``, and
        the ``score`` if the generator computes one.
    :param text: Gets the prompts and the completions for people to read, if given.
    :param streams: Whether ``text`` gets completions while they grow; a batch must then
        have one prompt.
    """

    def __init__(
        self,
        generator: SequenceGenerator,
        decode: TokenDecoder,
        jsonl: TextIO,
        text: TextIO | None,
        *,
        streams: bool = False,
    ) -> None:
        self._generator = generator
        self._decode = decode
        self._jsonl = jsonl
        self._text = text
        self._streams = streams

    @override
    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        add_seq_generator_metrics(metric_bag)

    @override
    def process_batch(self, batch: SequenceBatch, metric_bag: MetricBag) -> None:
        prompts = cast(Sequence[str], batch.example)

        if self._streams and self._text is not None:
            output = self._stream(self._text, prompts[0], *batch.as_input())
        else:
            output = self._generator(*batch.as_input())

        update_seq_generator_metrics(metric_bag, output)

        for prompt, hypotheses in zip(prompts, output.hypotheses, strict=True):
            self._write(prompt, hypotheses[0])

    def _stream(
        self, text: TextIO, prompt: str, seqs: Tensor, seqs_layout: BatchLayout
    ) -> SequenceGeneratorOutput:
        stream = TextStream(self._decode)

        def show(piece: str) -> None:
            text.write(piece)
            text.flush()

        show(f"> {prompt}\n")

        def on_token(seqs: Tensor, prefill: bool) -> None:
            if not prefill:
                show(stream.push(int(seqs[0, -1])))

        handle = self._generator.register_step_hook(
            lambda _, seqs, __, prefill: on_token(seqs, prefill)
        )

        with handle:
            output = self._generator(seqs, seqs_layout)

        show(stream.finish() + "\n\n")

        return output

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

        if self._text is not None and not self._streams:
            self._text.write(f"> {prompt}\n{text}\n\n")
            self._text.flush()
