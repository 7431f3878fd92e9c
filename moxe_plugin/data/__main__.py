"""The command ``moxe data``: prepares text for training."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moxe_plugin.data.overlap_command import add_overlap_options

if TYPE_CHECKING:
    from moxe_plugin.data.documents import SplitFractions
    from moxe_plugin.data.manifest import ShardManifest
    from moxe_plugin.data.sources import TextSource

_EPILOG = """examples:
  moxe data embedded
  moxe data tokenizer --files a.jsonl b.txt --vocab-size 8192 --output my_tokenizer
  moxe data build my_shards --tokenizer my_tokenizer --files a.jsonl b.txt
  moxe data build fineweb --tokenizer my_tokenizer --hf HuggingFaceFW/fineweb-edu \\
      --hf-config sample-10BT --max-tokens 100_000_000
  moxe data info my_shards --verify
  moxe data overlap --train a.jsonl --eval lambada=lambada_test.jsonl \\
      --output results/overlap.json
"""


def main(argv: list[str] | None = None) -> int:
    """Run ``moxe data``.

    :param argv: The arguments; ``None`` means those of the process.

    :returns: The exit code: 0, 1 for data that cannot be read, 2 for a user error, 130
        if it was interrupted.
    """
    args = _create_parser().parse_args(argv)

    from fairseq2.data.tokenizers import TokenizerModelError
    from fairseq2.datasets import DatasetError

    try:
        args.run(args)
    except (DatasetError, OSError, TokenizerModelError) as ex:
        _write(f"moxe data: {ex}", sys.stderr)

        return 1
    except KeyboardInterrupt:
        _write(
            "moxe data: interrupted; the same command continues a build.", sys.stderr
        )

        return 130
    except ValueError as ex:
        _write(f"moxe data: {ex}", sys.stderr)

        return 2

    return 0


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "moxe data",
        description="Prepare text for training.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )

    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="write token shards")
    command.add_argument("output", type=Path, help="the directory to make")
    command.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="a Hugging Face tokenizer: a directory or a tokenizer.json",
    )
    command.add_argument("--eos-token", help="what separates documents")
    _add_sources(command)
    command.add_argument("--valid-files", type=Path, nargs="+", metavar="FILE")
    command.add_argument("--test-files", type=Path, nargs="+", metavar="FILE")
    command.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        help="share of documents for `valid`, unless --valid-files (default: 0.01)",
    )
    command.add_argument(
        "--test-fraction",
        type=float,
        default=0.01,
        help="share of documents for `test`, unless --test-files (default: 0.01)",
    )
    command.add_argument("--max-tokens", type=int, help="stop after so many")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the directory"
    )
    command.add_argument(
        "--restart",
        action="store_true",
        help="drop an interrupted build instead of continuing it",
    )
    command.set_defaults(run=_build)

    command = commands.add_parser("tokenizer", help="train a BPE tokenizer")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--vocab-size", type=int, default=16_384)
    command.add_argument("--max-documents", type=int, help="stop after so many")
    _add_sources(command)
    command.set_defaults(run=_train_tokenizer)

    command = commands.add_parser("embedded", help="prepare the embedded corpus")
    command.add_argument("--size", choices=("quickstart", "full"), default="quickstart")
    command.set_defaults(run=_prepare_embedded)

    command = commands.add_parser(
        "overlap", help="look for evaluation texts in a training text"
    )
    add_overlap_options(command)

    command = commands.add_parser("info", help="describe a directory of token shards")
    command.add_argument("path", type=Path)
    command.add_argument("--verify", action="store_true", help="check every digest")
    command.set_defaults(run=_show_info)

    return parser


def _add_sources(parser: ArgumentParser) -> None:
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


def _build(args: Namespace) -> None:
    from moxe_plugin.data.build import ShardEncoding, build_shards_resumably
    from moxe_plugin.data.progress import Stages
    from moxe_plugin.data.sources import DocumentStream

    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} already exists; give --overwrite to replace.")

    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(f"`--max-tokens` must be positive, but is {args.max_tokens}.")

    stream = DocumentStream(_open_parts(args))

    with Stages() as stages, stages.start(f"Writing {args.output}") as stage:
        manifest = build_shards_resumably(
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
            notify=_notify,
            progress=stage.advance,
        )

    _describe(args.output, manifest)


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

    return [*parts, (_open_texts(args), fractions)]


def _open_texts(args: Namespace) -> TextSource:
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
        notify=_notify,
    )


def _notify(message: str) -> None:
    _write(f"moxe data: {message}", sys.stderr)


def _train_tokenizer(args: Namespace) -> None:
    from itertools import islice

    from moxe_plugin.data.bpe import train_bpe
    from moxe_plugin.data.progress import Stages

    with Stages() as stages, stages.start("Training the tokenizer") as stage:
        texts = islice(_open_texts(args), args.max_documents)
        train_bpe(stage.over(texts), args.vocab_size, args.output)

    _write(f"{args.output}: a tokenizer of {args.vocab_size} entries")


def _prepare_embedded(args: Namespace) -> None:
    from moxe_plugin.data.corpus import prepare_embedded
    from moxe_plugin.data.manifest import read_manifest

    data = prepare_embedded(args.size)

    _write(f"tokenizer     {data.tokenizer_dir}")
    _write(f"tokens        {data.tokens_dir}")
    _write(f"instructions  {data.instructions_dir}")
    _write(f"test text     {data.test_jsonl}")

    _describe(data.tokens_dir, read_manifest(data.tokens_dir))


def _show_info(args: Namespace) -> None:
    from moxe_plugin.data.shards import open_shards

    _describe(args.path, open_shards(args.path, verify=args.verify).manifest)

    if args.verify:
        _write("all digests match")


def _describe(path: Path, manifest: ShardManifest) -> None:
    _write(f"{path}: {manifest.dtype} tokens from {manifest.source}")
    _write(
        f"tokenizer {manifest.tokenizer_name}, {manifest.vocab_size} entries, "
        f"sha256 {manifest.tokenizer_sha256}"
    )

    for name, split in manifest.splits.items():
        _write(
            f"{name:<6} {split.num_tokens:>14,} tokens  {split.num_documents:>10,} "
            f"documents  {split.num_bytes:>14,} bytes"
        )


def _write(line: str, file: TextIO | None = None) -> None:
    (file if file is not None else sys.stdout).write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
