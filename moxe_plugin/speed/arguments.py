"""The arguments of ``moxe speed``, and what other benchmarks have of them."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moxe_plugin.console import add_json_option

_DEFAULT_OUT: Final = Path("results") / "speed"


def create_parser() -> ArgumentParser:
    """Create the parser of the command.

    :returns: The parser.
    """
    parser = ArgumentParser(
        prog="moxe speed",
        description="Measure tokens a second, memory and the share of the machine's "
        "peak, one system after the other in this process. Parameters and tokens are "
        "random, so routers spread tokens almost evenly over their experts; trained "
        "ones may not. At 340m a suite takes up to an hour on a CPU and 16 GB of "
        "memory.",
    )

    add = parser.add_argument

    add(
        "--suite",
        metavar="SUITE",
        nargs="+",
        default=["table1"],
        help="table1, ablations, length, experts, batch (training), decode, prefill; "
        "several are possible (default: table1)",
    )
    add(
        "--size",
        metavar="SIZE",
        default="340m",
        help="340m (the paper's Table 1), small, quickstart or tiny "
        "(default: %(default)s)",
    )
    add("--device", metavar="DEVICE", default="cpu", help="cpu (default) or cuda")
    add(
        "--dtype",
        metavar="TYPE",
        default="float32",
        help="float32 (default), bfloat16, or autocast: float32 parameters, products "
        "in bfloat16",
    )
    add(
        "--allocator",
        metavar="WHICH",
        default="kept",
        help="kept (default): the process keeps freed memory, as in training on a CPU; "
        "system: as the environment says",
    )
    add("--threads", metavar="N", type=_positive, help="threads of an operation")

    for option, text in {
        "--batch": "numbers of sequences in place of the suite's own",
        "--length": "lengths in place of the suite's own",
    }.items():
        add(option, metavar="N", type=_positive, nargs="+", default=[], help=text)

    add(
        "--experts",
        metavar="N",
        type=_positive,
        nargs="+",
        default=[8, 16, 32, 64],
        help="numbers of experts, for the suite experts (default: 8 16 32 64)",
    )
    add(
        "--tokens",
        metavar="N",
        type=_positive,
        help="tokens of a step, for the suite length (default: the longest length)",
    )

    add_numbers(
        parser,
        _positive,
        ("--repeats", 5, "calls that are timed"),
        (
            *("--rounds", 1),
            "how often the whole list is measured: what changes in minutes meets all "
            "systems alike",
        ),
        ("--decode-tokens", 16, "tokens of a call of decode"),
        ("--chunk", 512, "tokens that a state takes in at a time"),
        ("--seed", 1, "seeds parameters and tokens"),
        ("--copy-mib", 1024, "MiB that a copy reads which tells the memory's speed"),
    )

    add(
        "--swap-linear",
        action="store_true",
        help="measure systems of transformers a second time, with our products of "
        "matrices in place of torch's",
    )
    add(
        "--nxai-xlstm",
        action="store_true",
        help="measure training of xLSTM a second time, in NX-AI's package xlstm",
    )
    add(
        "--capture-steps",
        action="store_true",
        help="measure decode of recurrent models a second time, each step launched as "
        "a whole from a CUDA graph (on cuda only)",
    )
    add(
        "--router-skew",
        metavar="STD",
        type=float,
        default=0.0,
        help="standard deviation of what MoxE's routers add to the logit of each "
        "expert, to make them uneven (default: 0)",
    )
    add(
        "--checkpoint-layers",
        action="store_true",
        help="training keeps the inputs of layers only, and computes the rest again",
    )
    add(
        "--warm-up",
        metavar="N",
        type=int,
        default=1,
        help="calls before them (default: %(default)s)",
    )
    add(
        "--matmul-size",
        metavar="N",
        type=_positive,
        help="rows of the matrices that tell the peak (default: 2048, on cuda 8192)",
    )
    add_output_options(parser)
    add_json_option(parser)

    return parser


def add_numbers(
    parser: ArgumentParser,
    parse: Callable[[str], int],
    *numbers: tuple[str, int, str],
) -> None:
    """Add options that take a number.

    :param parser: Gets them.
    :param parse: Reads the number.
    :param numbers: The name, the default and the meaning of each.
    """
    for option, default, text in numbers:
        parser.add_argument(
            option,
            metavar="N",
            type=parse,
            default=default,
            help=f"{text} (default: %(default)s)",
        )


def add_output_options(
    parser: ArgumentParser,
    name: str | None = None,
    *,
    described: str = "after machine and type",
) -> None:
    """Add ``--name`` and ``--out``, which tell where records go.

    :param parser: Gets them.
    :param name: The default name; ``None`` if it depends on what is measured.
    :param described: What the help says of such a name.
    """
    parser.add_argument(
        "--name",
        metavar="NAME",
        default=name,
        help=f"name of the files without suffix (default: {name or described})",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=_DEFAULT_OUT,
        help="where NAME.json and NAME.md go (default: %(default)s)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be an integer of at least 1, but is '{text}'")

    return int(text)
