"""The command ``moxe data overlap``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moxe_plugin.data.overlap_file import EvalOverlap


def add_overlap_options(parser: ArgumentParser) -> None:
    """Add the options of ``moxe data overlap`` and what runs it.

    :param parser: The parser of the command.
    """
    files = "FILE"

    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        metavar=files,
        help=".txt, .jsonl, .parquet, or a directory of token shards (`train`)",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        required=True,
        action="extend",
        metavar="NAME=FILE",
        dest="evals",
        help="an evaluation set, likewise (token shards: `valid`); a name may come "
        "more than once",
    )
    parser.add_argument(
        "--text-column",
        default="text",
        help="objects without it count with all their texts (default: text)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="the tokenizer of token shards, if not where they say",
    )
    parser.add_argument(
        "--ngram-size", type=int, default=13, help="words in an n-gram (default: 13)"
    )
    parser.add_argument(
        "--num-examples",
        type=int,
        default=3,
        help="items to show of each set (default: 3)",
    )
    parser.add_argument("--output", type=Path, help="where to write overlap.json")
    parser.add_argument(
        "--json", action="store_true", help="print the JSON instead of a summary"
    )
    parser.set_defaults(run=run_overlap)


def run_overlap(args: Namespace) -> None:
    """Measure the overlap of texts, print it and write it.

    :param args: The parsed options.

    :raises ValueError: An option has a wrong value.
    """
    from moxe_plugin.data.overlap import TextReader, measure_overlap

    if args.ngram_size < 1:
        raise ValueError(f"`--ngram-size` must be positive, but is {args.ngram_size}.")

    if args.num_examples < 0:
        raise ValueError(
            f"`--num-examples` must not be negative, but is {args.num_examples}."
        )

    overlap = measure_overlap(
        args.train,
        _parse_evals(args.evals),
        TextReader(text_column=args.text_column, tokenizer_path=args.tokenizer),
        ngram_size=args.ngram_size,
        num_examples=args.num_examples,
    )

    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(overlap.to_json(), encoding="utf-8")

    if args.json:
        sys.stdout.write(overlap.to_json())

        return

    for name, found in overlap.evals.items():
        sys.stdout.write("\n".join(_describe(name, found)) + "\n")


def _parse_evals(values: Sequence[str]) -> dict[str, list[Path]]:
    evals: dict[str, list[Path]] = {}

    for value in values:
        name, separator, file = value.partition("=")

        if not (name and separator and file):
            raise ValueError(
                f"`--eval` must be NAME=FILE, but is `{value}` instead. For example: "
                "lambada=lambada_test.jsonl."
            )

        evals.setdefault(name, []).append(Path(file))

    return evals


def _describe(name: str, found: EvalOverlap) -> list[str]:
    share = "-" if found.share is None else f"{found.share:.2%}"

    lines = [
        f"{name}: {found.num_overlapping_items:,} of {found.num_items:,} items overlap "
        f"({share} of those long enough; {found.num_short_items:,} are too short)"
    ]

    for example in found.worst:
        lines.append(
            f"  item {example.item}: {example.num_overlapping_ngrams:,} of "
            f"{example.num_ngrams:,} n-grams, first: {example.ngram}"
        )

    return lines
