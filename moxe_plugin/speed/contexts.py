"""``python -m moxe_plugin.speed.contexts``: one token more, after texts of any length.

`moxe speed --suite decode` measures one length after the other, in minutes in which the
speed of a machine changes by more than what is looked for. Here one model holds a state
for each length, and the lengths take turns.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pandas as pd
from rich.console import Console

from moxe_plugin.speed.arguments import add_output_options

_CHUNK_LEN: Final = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Time steps of MoxE and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    try:
        _measure(args)
    except (ValueError, OSError) as ex:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {ex}", markup=False, highlight=False
        )

        return 2

    return 0


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.contexts",
        description="Time MoxE's steps of one token after texts of several lengths, by "
        "turns: batch 1, float32, on the CPU.",
    )
    add = parser.add_argument

    add("--arch", default="340m", help="architecture of MoxE (default: 340m)")
    add("--length", type=int, nargs="+", default=[256, 16_384], metavar="N")
    add("--tokens", type=int, default=16, metavar="N", help="of a turn (default: 16)")
    add("--repeats", type=int, default=15, metavar="N", help="turns (default: 15)")
    add("--threads", type=int, default=2, metavar="N", help="default: 2")
    add_output_options(parser, "contexts")

    return parser


def _check(args: Namespace) -> None:
    for name, values in (
        ("tokens", [args.tokens]),
        ("repeats", [args.repeats]),
        ("threads", [args.threads]),
        ("length", args.length),
    ):
        if min(values) < 1:
            raise ValueError(
                f"`{name}` must be at least 1, but is {min(values)} instead."
            )


def _create_model(arch: str, max_len: int) -> tuple[Any, int]:
    import torch
    from fairseq2.gang import create_fake_gangs
    from fairseq2.models import ModelFamily
    from fairseq2.runtime.dependency import get_dependency_resolver

    from moxe_plugin.models.moxe.config import MOXE_FAMILY

    family = get_dependency_resolver().resolve(ModelFamily, key=MOXE_FAMILY)
    config: Any = family.maybe_get_arch_config(arch)
    if config is None:
        raise ValueError(
            f"`arch` must be an architecture of MoxE, but is '{arch}' instead. "
            "`moxe systems` lists them."
        )

    model = family.create_new_model(
        replace(config, max_seq_len=max(config.max_seq_len, max_len)),
        create_fake_gangs(torch.device("cpu")),
        torch.float32,
        meta=False,
        init_rank0_only=False,
    )

    return model.eval(), config.vocab_size


def _measure(args: Namespace) -> None:
    _check(args)

    import torch
    from fairseq2 import init_fairseq2
    from fairseq2.nn import IncrementalStateBag

    from moxe_plugin.allocator import keep_freed_memory
    from moxe_plugin.speed.clock import time_repeats
    from moxe_plugin.speed.measuring import describe_machine
    from moxe_plugin.speed.options import MeasureOptions

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    keep_freed_memory()
    init_fairseq2()

    device = torch.device("cpu")
    num_new = args.tokens * (args.repeats + 1)
    max_len = max(args.length) + num_new

    model, vocab_size = _create_model(args.arch, max_len)
    ids = torch.randint(0, vocab_size, (1, max_len))

    states = {length: IncrementalStateBag(max_len + 1) for length in args.length}
    for length, state_bag in states.items():
        for begin in range(0, length, _CHUNK_LEN):
            _read(model, ids, state_bag, min(begin + _CHUNK_LEN, length))

    def step(length: int) -> None:
        for _ in range(args.tokens):
            _read(model, ids, states[length], states[length].step_nr + 1)

    seconds: dict[int, list[float]] = {length: [] for length in args.length}
    for turn in range(args.repeats + 1):
        for length, times in seconds.items():
            [elapsed_s] = time_repeats(partial(step, length), 1, device)
            # The first turn warms up.
            if turn > 0:
                times.append(elapsed_s)

    rows = [
        {
            "length": length,
            "tokens": args.tokens,
            "seconds": statistics.median(times),
            "seconds_all": times,
            "state_bytes": states[length].size_bytes(),
        }
        for length, times in seconds.items()
    ]
    _write(describe_machine(MeasureOptions(device=device)), rows, args)


def _read(model: Any, ids: Any, state_bag: Any, end: int) -> None:
    import torch
    from fairseq2.nn import BatchLayout

    seqs = ids[:, state_bag.step_nr : end]

    with torch.no_grad():
        model(seqs, BatchLayout.of(seqs), state_bag=state_bag)

    state_bag.increment_step_nr(seqs.size(1))


def _write(
    machine: dict[str, Any], rows: Sequence[dict[str, Any]], args: Namespace
) -> None:
    from moxe_plugin.report.files import write_json

    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / f"{args.name}.json",
        {"machine": machine, "arch": args.arch, "rows": list(rows)},
    )

    first = rows[0]["seconds"]
    table = pd.DataFrame(
        {
            "length": f"{row['length']:,}",
            "tokens": str(row["tokens"]),
            "s": f"{row['seconds']:.4g}",
            "range": f"{min(row['seconds_all']):.4g} to {max(row['seconds_all']):.4g}",
            "tokens/s": f"{row['tokens'] / row['seconds']:.1f}",
            "state (MiB)": f"{row['state_bytes'] / 2**20:.2f}",
            "than the first": f"{row['seconds'] / first:.3f}",
        }
        for row in rows
    )
    page = (
        f"# Steps of MoxE after texts of several lengths: {args.name}\n\n"
        f"Written by `python -m moxe_plugin.speed.contexts` from `{args.name}.json`: "
        f"{args.arch}, batch 1,\nfloat32, {machine['model']}, {args.threads} threads; "
        f"lengths took turns, {args.repeats} each. The last column "
        "says\nhow many times as long it takes.\n\n"
    )
    text = f"{page}{table.to_markdown(index=False, disable_numparse=True)}\n"
    (args.out / f"{args.name}.md").write_text(text, "utf-8")

    Console(soft_wrap=True).print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
