"""``python -m moxe_plugin.eval.agreement``: our scores beside those of `hf`.

Both score the same requests with the same weights, a folder that ``moxe export`` wrote:
the last word of each passage of LAMBADA. Our adapter also scores them one by one.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

TOLERANCE_NATS: Final = 1e-4
"""The largest difference of a log-likelihood that float32 explains."""


class Agreement(NamedTuple):
    """How two lists of scores differ."""

    num_requests: int
    max_difference_nats: float
    """The largest difference of a log-likelihood."""

    max_relative_difference: float
    """The largest difference over the size of the first log-likelihood, or over a nat
    where that is less."""

    num_other_greedy: int
    """Requests of which only one finds the continuation to be the greedy one."""

    @property
    def holds(self) -> bool:
        """Whether the scores are equal, but for rounding."""
        return self.max_difference_nats <= TOLERANCE_NATS and self.num_other_greedy == 0


def main(argv: list[str] | None = None) -> int:
    """Compare on the passages of a file.

    :param argv: The arguments; those of the process by default.

    :returns: 0 if all scores agree, 1 if not, 2 for a user error.
    """
    args = _create_parser().parse_args(argv)

    if find_spec("accelerate") is None:
        return _fail("the harness' `hf` needs accelerate: `uv pip install accelerate`.")

    try:
        pairs = read_last_words(args.lambada, args.limit)
        agreements = compare(args.folder, pairs, args.batch_size)
    except (OSError, ValueError) as ex:
        return _fail(str(ex))

    for name, agreement in agreements.items():
        verdict = "agrees" if agreement.holds else "DIFFERS"
        _write(
            f"{verdict}: {name}: {agreement.num_requests} requests, the largest "
            f"difference is {agreement.max_difference_nats:.2g} nats, "
            f"{agreement.num_other_greedy} differ in being greedy"
        )

    return 0 if all(agreement.holds for agreement in agreements.values()) else 1


def compare(
    folder: Path, pairs: Sequence[tuple[str, str]], batch_size: int = 16
) -> dict[str, Agreement]:
    """Score continuations with both models, and with ours one by one.

    :param folder: A model that ``moxe export`` wrote.
    :param pairs: Context and continuation.
    :param batch_size: Sequences per batch of the harness' model.

    :returns: How the harness' ``hf`` and our batches of one differ from our adapter
        with automatic batches, by name.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moxe_plugin.eval.adapter import LoadedModelLM
    from moxe_plugin.eval.checkpoints import load_checkpoint
    from moxe_plugin.eval.registration import register_transformers_classes

    register_transformers_classes()

    load: Any = AutoModelForCausalLM.from_pretrained
    load_tokenizer: Any = AutoTokenizer.from_pretrained
    loaded = load_checkpoint(str(folder))

    ours = score_pairs(LoadedModelLM(loaded, batch_size="auto"), pairs)
    theirs = score_pairs(
        HFLM(load(folder), tokenizer=load_tokenizer(folder), batch_size=batch_size),
        pairs,
    )
    one_by_one = score_pairs(LoadedModelLM(loaded, batch_size=1), pairs)

    return {
        "hf and moxe": compare_scores(theirs, ours),
        "moxe with batch size 1 and auto": compare_scores(one_by_one, ours),
    }


def score_pairs(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Score continuations with a model of the harness.

    :param lm: The model.
    :param pairs: Context and continuation.

    :returns: The log-likelihoods in nats, and whether the continuation is the greedy
        one.
    """
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=idx)
        for idx, pair in enumerate(pairs)
    ]
    scores: list[tuple[float, bool]] = lm.loglikelihood(requests)

    return scores


def compare_scores(
    first: Sequence[tuple[float, bool]], second: Sequence[tuple[float, bool]]
) -> Agreement:
    """Compare two lists of scores of the same requests.

    :param first: What :func:`score_pairs` returned.
    :param second: As ``first``.

    :returns: How they differ.
    """
    both = list(zip(first, second, strict=True))

    return Agreement(
        len(both),
        max(abs(a - b) for (a, _), (b, _) in both),
        max(abs(a - b) / max(1.0, abs(a)) for (a, _), (b, _) in both),
        sum(bool(a) != bool(b) for (_, a), (_, b) in both),
    )


def read_last_words(file: Path, limit: int | None) -> list[tuple[str, str]]:
    """Read passages and split off their last word.

    :param file: JSON lines with the field ``text``, such as LAMBADA's.
    :param limit: How many passages, from the first on; all if ``None``.

    :returns: Context and continuation.

    :raises ValueError: There is no passage.
    """
    pairs = []

    with file.open(encoding="utf-8") as fp:
        for line in fp:
            row: Mapping[str, str] = json.loads(line)
            context, _, word = row["text"].rpartition(" ")
            pairs.append((context, f" {word}"))

    if not pairs:
        raise ValueError(f"'{file}' has no passage.")

    return pairs[:limit]


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.eval.agreement",
        description="Compare our adapter with the harness' own model `hf` on the same "
        "weights.",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="what `moxe export RUN DIR` wrote"
    )
    parser.add_argument(
        "--lambada",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON lines with the field `text`",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, help="the first N passages only"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=16, help="of `hf` (default: 16)"
    )

    return parser


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")

    return 2


if __name__ == "__main__":
    sys.exit(main())
