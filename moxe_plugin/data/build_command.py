"""The command ``moxe data build``, and the options that name a text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moxe_plugin.data.documents import SplitFractions
    from moxe_plugin.data.manifest import ShardManifest
    from moxe_plugin.data.sources import TextSource


def add_build_options(parser: ArgumentParser) -> None:
    """Add the options of ``moxe data build``.

    :param parser: The parser of the command.
    """
    parser.add_argument("output", type=Path, help="the directory to make")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="a Hugging Face tokenizer: a directory or a tokenizer.json",
    )
    parser.add_argument("--eos-token", help="what separates documents")
    add_source_options(parser)
    parser.add_argument("--valid-files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--test-files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        help="share of documents for `valid`, unless --valid-files (default: 0.01)",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.01,
        help="share of documents for `test`, unless --test-files (default: 0.01)",
    )
    parser.add_argument("--max-tokens", type=int, help="stop after so many")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the directory"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="drop an interrupted build instead of continuing it",
    )


def add_source_options(parser: ArgumentParser) -> None:
    """Add the options that name a text.

    :param parser: The parser of a command.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--files", type=Path, nargs="+", metavar="FILE", help=".txt, .jsonl, .parquet"
    )
    source.add_argument(
        "--hf", metavar="NAME", help="a Hugging Face dataset, or a directory like one"
    )

    parser.add_argument("--text-column", default="text", help="(default: text)")
    parser.add_argument("--hf-config", metavar="NAME")
    parser.add_argument("--hf-split", default="train", help="(default: train)")
    parser.add_argument(
        "--hf-revision", metavar="COMMIT", help="commit or tag (default: the newest)"
    )
    parser.add_argument(
        "--no-streaming", action="store_true", help="download the whole dataset first"
    )


def run_build(args: Namespace) -> ShardManifest:
    """Build token shards.

    :param args: The parsed options.

    :returns: The manifest.

    :raises ValueError: An option has a wrong value.
    """
    from moxe_plugin.console import Stages
    from moxe_plugin.data.build import ShardEncoding, build_shards_resumably
    from moxe_plugin.data.sources import DocumentStream

    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} already exists; give --overwrite to replace.")

    if args.output.exists() and not _is_replaceable(args.output):
        raise ValueError(
            f"{args.output} is not a directory of token shards, so that `--overwrite` "
            "does not replace it. Choose another one, or remove it."
        )

    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(f"`--max-tokens` must be positive, but is {args.max_tokens}.")

    stream = DocumentStream(_open_parts(args))

    with (
        Stages() as stages,
        stages.start(f"Writing {args.output}", _count_documents(args)) as stage,
    ):
        return build_shards_resumably(
            stream,
            args.output,
            ShardEncoding(
                tokenizer_path=args.tokenizer,
                eos_token=args.eos_token,
                max_tokens=args.max_tokens,
            ),
            source=args.hf or ", ".join(f.name for f in args.files),
            overwrite=args.overwrite,
            restart=args.restart,
            notify=notify,
            progress=stage.advance,
        )


def _count_documents(args: Namespace) -> int | None:
    from moxe_plugin.data.documents import count_rows

    # A limit in tokens tells nothing of the number of documents.
    if not args.files or args.max_tokens is not None:
        return None

    held_out = [*(args.valid_files or ()), *(args.test_files or ())]

    return count_rows([*args.files, *held_out])


def _is_replaceable(path: Path) -> bool:
    from moxe_plugin.data.manifest import MANIFEST_FILE

    return path.is_dir() and (
        path.joinpath(MANIFEST_FILE).is_file() or not any(path.iterdir())
    )


def _open_parts(
    args: Namespace,
) -> list[tuple[TextSource, str | SplitFractions]]:
    from moxe_plugin.data.documents import SplitFractions
    from moxe_plugin.data.sources import FileTexts

    fractions = SplitFractions(
        valid=0.0 if args.valid_files else args.valid_fraction,
        test=0.0 if args.test_files else args.test_fraction,
    )

    smallest = min(fractions.valid, fractions.test)

    # Not `>=`, which is false for NaN too.
    if not (smallest >= 0.0 and fractions.valid + fractions.test < 1.0):
        raise ValueError(
            "`--valid-fraction` and `--test-fraction` must not be negative and must "
            "leave something to train on, but are "
            f"{fractions.valid:g} and {fractions.test:g}."
        )

    parts: list[tuple[TextSource, str | SplitFractions]] = []

    # Held-out files first: `--max-tokens` must not cut them off.
    for split, files in (("valid", args.valid_files), ("test", args.test_files)):
        if files:
            parts.append((FileTexts(files, args.text_column), split))

    return [*parts, (open_texts(args), fractions)]


def open_texts(args: Namespace) -> TextSource:
    """Open the text that options name.

    :param args: The parsed options.

    :returns: The text.
    """
    from moxe_plugin.data.hub import HubTexts
    from moxe_plugin.data.sources import FileTexts

    if args.files:
        return FileTexts(args.files, args.text_column)

    return HubTexts(
        args.hf,
        args.hf_config,
        args.hf_split,
        args.text_column,
        revision=args.hf_revision,
        streaming=not args.no_streaming,
        notify=notify,
    )


def notify(message: str) -> None:
    """Tell the user of something that is no error.

    :param message: What to tell.
    """
    sys.stderr.write(f"moxe data: {message}\n")
