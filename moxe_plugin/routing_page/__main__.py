"""``moxe inspect``: show where a model sends each token of a text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Final

from moxe_plugin.console import Stages

DEFAULT_OUT_DIR: Final = Path("outputs/routing")
_DEFAULT_MAX_TOKENS: Final = 1024


def main(argv: list[str] | None = None) -> int:
    """Write the routing page of a text, and print its compact form.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    from rich.console import Console

    error_console = Console(stderr=True, soft_wrap=True)

    try:
        _inspect(args)
    except (ValueError, OSError) as ex:
        error_console.print(f"error: {ex}", markup=False, highlight=False)

        return 2

    return 0


def _inspect(args: Namespace) -> None:
    text = args.text if args.file is None else _read(args.file)

    # torch and fairseq2 take seconds to import; `--help` and a missing file must not.
    from moxe_plugin.eval.checkpoints import load_checkpoint
    from moxe_plugin.report.terminal import create_console
    from moxe_plugin.routing_page.html import render_page
    from moxe_plugin.routing_page.image import draw_image
    from moxe_plugin.routing_page.terminal import print_view
    from moxe_plugin.routing_page.view import create_view

    # Loading, tracing; drawing takes no time.
    with Stages() as stages, stages.start("Reading the text", 2) as stage:
        loaded = load_checkpoint(args.checkpoint, step=args.step)
        stage.advance()

        view = create_view(
            loaded,
            text,
            max_tokens=args.max_tokens,
            title=args.title,
            source=args.source,
        )
        stage.advance()

    num_layers = len(view.trace.layers)
    if not 0 <= args.layer < num_layers:
        raise ValueError(
            f"`--layer` must be between 0 and {num_layers - 1}, but is {args.layer} "
            "instead."
        )

    out_dir: Path = args.out
    out_dir.mkdir(parents=True, exist_ok=True)

    (out_dir / "routing.html").write_text(
        render_page(view, args.layer), encoding="utf-8"
    )
    draw_image(view, out_dir / "routing.png")

    console = create_console()
    print_view(view, args.layer, console)
    console.print(
        f"Written: routing.html and routing.png in {out_dir}",
        markup=False,
        highlight=False,
    )


def _read(file: Path) -> str:
    content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()

    try:
        # Line ends stay as they are: the model reads them.
        return content.decode()
    except UnicodeDecodeError as ex:
        raise ValueError(
            f"`{file}` must be UTF-8, but has {content[ex.start : ex.start + 1]!r} at "
            f"byte {ex.start}."
        ) from ex


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moxe inspect",
        description="Show where a MoxE sends each token of a text: one HTML page that "
        "needs nothing else (routing.html), an image (routing.png), and a compact form "
        "on the terminal.",
    )

    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="output directory of a training, or asset name",
    )

    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="TEXT", help="the text")
    text.add_argument(
        "--file", metavar="FILE", type=Path, help="a file of UTF-8 text; - is stdin"
    )

    parser.add_argument(
        "--step", metavar="N", type=int, help="checkpoint's step (default: the last)"
    )

    parser.add_argument(
        "--layer",
        metavar="N",
        type=int,
        default=0,
        help="layer to show first, and on the terminal (default: %(default)s)",
    )

    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=_DEFAULT_MAX_TOKENS,
        help="read only the first N tokens, and say so (default: %(default)s)",
    )

    parser.add_argument(
        "--title", metavar="TEXT", help="what to call the model (default: its place)"
    )

    parser.add_argument(
        "--source", metavar="TEXT", help="where the text is from, shown below it"
    )

    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=DEFAULT_OUT_DIR,
        help="directory of the files (default: %(default)s)",
    )

    return parser


if __name__ == "__main__":
    sys.exit(main())
