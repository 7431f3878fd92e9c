"""The command ``moxe data``: prepares text for training."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moxe_plugin.console import add_json_option, print_json
from moxe_plugin.data.build_command import (
    add_build_options,
    add_source_options,
    notify,
    open_texts,
    run_build,
)
from moxe_plugin.data.overlap_command import add_overlap_options

if TYPE_CHECKING:
    from moxe_plugin.data.manifest import ShardManifest

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
    add_build_options(command)
    command.set_defaults(run=_build)

    command = commands.add_parser("tokenizer", help="train a BPE tokenizer")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--vocab-size", type=int, default=16_384)
    command.add_argument("--max-documents", type=int, help="stop after so many")
    add_source_options(command)
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
    add_json_option(command)
    command.set_defaults(run=_show_info)

    return parser


def _build(args: Namespace) -> None:
    _describe(args.output, run_build(args))


def _train_tokenizer(args: Namespace) -> None:
    from itertools import islice

    from moxe_plugin.console import Stages
    from moxe_plugin.data.bpe import train_bpe
    from moxe_plugin.data.documents import count_rows

    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(
            f"`--max-documents` must be positive, but is {args.max_documents}."
        )

    total = args.max_documents
    if args.files and (num_rows := count_rows(args.files)) is not None:
        total = min(num_rows, total or num_rows)

    with Stages() as stages, stages.start("Training the tokenizer", total) as stage:
        texts = islice(open_texts(args), args.max_documents)
        size = train_bpe(stage.over(texts), args.vocab_size, args.output)

    _write(f"{args.output}: a tokenizer of {size} entries")

    if size < args.vocab_size:
        notify(
            f"`--vocab-size` is {args.vocab_size}, but the text has nothing more to "
            "merge."
        )


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

    manifest = open_shards(args.path, verify=args.verify).manifest

    if args.json:
        print_json({"path": args.path, "is_verified": args.verify, **asdict(manifest)})

        return

    _describe(args.path, manifest)

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
