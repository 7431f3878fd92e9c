"""``python -m moxe_plugin.speed.sharing``: what shared beginnings spare.

A checkpoint scores the same requests twice, with every input computed by itself and
with beginnings that inputs share computed once: the answers to questions, and the last
words of passages.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moxe_plugin.speed.arguments import add_output_options
from moxe_plugin.speed.sharing_records import SharingRow, write_sharing

if TYPE_CHECKING:
    from moxe_plugin.eval.checkpoints import LoadedModel


def main(argv: list[str] | None = None) -> int:
    """Measure both ways on files and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0 if all scores agree, 1 if not, 2 for a user error.
    """
    args = _create_parser().parse_args(argv)

    try:
        rows = _measure(args)
    except (OSError, ValueError) as ex:
        sys.stderr.write(f"error: {ex}\n")

        return 2

    for row in rows:
        verdict = "same scores" if row.agrees else "OTHER SCORES"
        sys.stdout.write(
            f"{verdict}: {row.file}: {row.tokens_alone / row.tokens_shared:.2f} times "
            f"fewer tokens, {row.seconds_alone / row.seconds_shared:.2f} times faster, "
            f"{row.max_difference_nats:.2g} nats apart at most, "
            f"{row.max_relative_difference:.2g} of a log-likelihood\n"
        )

    return 0 if all(row.agrees for row in rows) else 1


def measure_sharing(
    loaded: LoadedModel, file: str, kind: str, pairs: Sequence[tuple[str, str]]
) -> SharingRow:
    """Score requests without sharing and with it.

    :param loaded: A model with recurrent state.
    :param file: The name of the file that the requests come from.
    :param kind: As in :class:`SharingRow`.
    :param pairs: Context and continuation.

    :returns: What was measured.

    :raises ValueError: The model has no state that could be shared.
    """
    from moxe_plugin.eval.adapter import LoadedModelLM
    from moxe_plugin.eval.agreement import compare_scores, score_pairs

    scores, seconds, tokens = [], [], []

    for share_prefixes in (False, True):
        lm = LoadedModelLM(loaded, batch_size="auto", share_prefixes=share_prefixes)
        # Compiles and allocates what the first call must.
        score_pairs(lm, pairs[:2])
        before = int(lm.get_model_info()["num_tokens_computed"])

        began = time.perf_counter()
        scores.append(score_pairs(lm, pairs))
        seconds.append(time.perf_counter() - began)

        tokens.append(int(lm.get_model_info()["num_tokens_computed"]) - before)

    agreement = compare_scores(*scores)
    lengths = [len(lm._encode_pair(*pair)[1]) for pair in pairs]

    return SharingRow(
        file=file,
        kind=kind,
        num_requests=len(pairs),
        tokens_alone=tokens[0],
        tokens_shared=tokens[1],
        seconds_alone=seconds[0],
        seconds_shared=seconds[1],
        max_difference_nats=agreement.max_difference_nats,
        max_relative_difference=agreement.max_relative_difference,
        max_difference_per_token_nats=max(
            abs(a - b) / length
            for (a, _), (b, _), length in zip(*scores, lengths, strict=True)
        ),
        num_other_greedy=agreement.num_other_greedy,
    )


def read_questions(
    file: Path, limit: int | None, max_choice_chars: int | None = None
) -> list[tuple[str, str]]:
    """Read questions as the task ``moxe_multiple_choice`` asks them.

    :param file: JSON lines with ``query`` and ``choices``.
    :param limit: How many questions, from the first on; all if ``None``.
    :param max_choice_chars: Leave out questions with a longer answer.

    :returns: Context and continuation, one pair per answer.

    :raises ValueError: There is no question.
    """
    from moxe_plugin.eval.tasks import load_multiple_choice

    questions = load_multiple_choice(str(file), max_choice_chars=max_choice_chars)
    rows: list[Mapping[str, Any]] = questions["test"].to_list()

    return [
        (f"{row['query']}Answer:", f" {choice}")
        for row in rows[:limit]
        for choice in row["choices"]
    ]


def _measure(args: Any) -> list[SharingRow]:
    from moxe_plugin.eval.agreement import read_last_words
    from moxe_plugin.eval.checkpoints import load_checkpoint

    requests = []

    if args.questions is not None:
        pairs = read_questions(args.questions, args.limit, args.max_choice_chars)
        requests.append((args.questions.name, "multiple_choice", pairs))

    if args.lambada is not None:
        pairs = read_last_words(args.lambada, args.limit)
        requests.append((args.lambada.name, "last_word", pairs))

    if not requests:
        raise ValueError(
            "`--questions` or `--lambada` must name a file, but none does."
        )

    loaded = load_checkpoint(args.checkpoint)

    rows = [measure_sharing(loaded, *request) for request in requests]

    write_sharing(args.out, args.name, loaded, rows)

    return rows


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.sharing",
        description="Measure what it spares to compute beginnings once that requests "
        "of lm-evaluation-harness share.",
    )

    add = parser.add_argument

    add("checkpoint", metavar="CHECKPOINT", help="a run, an export or an asset")
    add(
        "--questions",
        metavar="FILE",
        type=Path,
        help="JSON lines with `query`, `choices` and `gold`, such as PIQA",
    )
    add(
        "--lambada",
        metavar="FILE",
        type=Path,
        help="JSON lines with the field `text`, whose last word is scored",
    )
    add(
        "--max-choice-chars",
        metavar="N",
        type=int,
        help="leave out questions with a longer answer",
    )
    add("--limit", metavar="N", type=int, help="the first N of each file only")
    add_output_options(parser, described="after family and machine")

    return parser


if __name__ == "__main__":
    sys.exit(main())
