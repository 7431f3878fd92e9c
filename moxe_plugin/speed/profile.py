"""``python -m moxe_plugin.speed.profile``: where a training step's time goes.

A step is timed as ``moxe speed`` times it, and how long the host needs to launch it;
then PyTorch's profiler lists what ran in one more step, on a GPU its kernels, on a CPU
PyTorch's operations.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moxe_plugin.speed.arguments import add_numbers, add_output_options

if TYPE_CHECKING:
    import torch

_PAGE: Final = """\
# Profile: {name}

Written by `python -m moxe_plugin.speed.profile`, from `{name}.json`; nothing is typed
by hand. {family} {arch}, {batch} x {length}, {dtype}, on {device}, torch {torch},
commit {commit}.

- **Step**, forward and backward: {step_ms:.1f} ms, the median of {repeats}:
  {tokens_per_s:,.0f} tokens/s.
- **Host**: it has launched all of it after {host_ms:.1f} ms.
- **Calls** of one more step: {num_calls:,}, which took {busy_ms:.1f} ms in all.

{table}
"""


class CallTime(NamedTuple):
    """What ran in a step, by its name."""

    name: str
    """A kernel's, or an operation's."""

    num_calls: int
    """How often it ran."""

    milliseconds: float
    """How long in all."""


class StepTimes(NamedTuple):
    """Times of whole steps, in seconds."""

    steps: list[float]
    """From the first launch until all has been computed."""

    host: list[float]
    """Until all had been launched."""


def main(argv: list[str] | None = None) -> int:
    """Profile a training step and write what was measured.

    :param argv: The arguments; those of the process by default.

    :returns: 0, or 2 for a mistake of the user.
    """
    args = _create_parser().parse_args(argv)

    try:
        page = _profile(args)
    except (ValueError, OSError, RuntimeError) as ex:
        sys.stderr.write(f"error: {ex}\n")

        return 2

    sys.stdout.write(page)

    return 0


def time_steps(
    call: Callable[[], object], repeats: int, device: torch.device
) -> StepTimes:
    """Time a call, and its launches.

    :param call: What is timed; it is not warmed up.
    :param repeats: How often.
    :param device: What it computes on.

    :returns: The times.
    """
    from moxe_plugin.speed.clock import time_repeats

    host: list[float] = []

    def launch() -> None:
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)

    return StepTimes(time_repeats(launch, repeats, device), host)


def list_calls(call: Callable[[], object], device: torch.device) -> list[CallTime]:
    """List what runs in a call.

    :param call: What is profiled.
    :param device: What it computes on.

    :returns: The kernels, or on a CPU the operations without those that they call; what
        took longest comes first.
    """
    from torch.profiler import ProfilerActivity, profile

    is_cpu = device.type == "cpu"
    activity = ProfilerActivity.CPU if is_cpu else ProfilerActivity.CUDA

    with profile(activities=[activity], acc_events=True) as profiler:
        call()
        _synchronize(device)

    counts: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type.name == activity.name:
            counts[event.key] += event.count
            times[event.key] += (
                event.self_cpu_time_total if is_cpu else event.self_device_time_total
            )

    calls = [CallTime(name, counts[name], times[name] / 1e3) for name in counts]

    return sorted(calls, key=lambda x: -x.milliseconds)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(args: Namespace) -> str:
    import pandas as pd
    import torch

    from moxe_plugin.bench.machine import describe_code, describe_hardware
    from moxe_plugin.report.files import write_json, write_text
    from moxe_plugin.speed.measuring import create_workload
    from moxe_plugin.speed.options import MeasureOptions
    from moxe_plugin.speed.suites import SpeedCase
    from moxe_plugin.systems.catalogue import list_systems

    for name in ("batch", "length", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"`{name}` must be at least 1, but is {getattr(args, name)} instead."
            )

    archs = {x.family: x.arch for x in reversed(list_systems(args.size))}
    if args.family not in archs:
        raise ValueError(
            f"`family` must be one of {', '.join(sorted(archs))}, but is "
            f"'{args.family}' instead."
        )

    device = torch.device(args.device)
    case = SpeedCase(
        suite="profile",
        family=args.family,
        arch=archs[args.family],
        phase="train",
        batch=args.batch,
        length=args.length,
    )
    options = MeasureOptions(device=device, precision=args.dtype)
    options.check()

    call = create_workload(case, options).call
    time_steps(call, args.warm_up, device)
    times = time_steps(call, args.repeats, device)
    calls = list_calls(call, device)

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    hardware = describe_hardware(device.type, gpu, torch.get_num_threads(), 1)
    code = describe_code()
    step = statistics.median(times.steps)
    measured: dict[str, Any] = {
        "family": case.family,
        "arch": case.arch,
        "batch": case.batch,
        "length": case.length,
        "dtype": options.precision,
        "device": gpu or hardware.model,
        "torch": torch.__version__.partition("+")[0],
        "commit": code.commit,
        "repeats": args.repeats,
        "step_ms": step * 1e3,
        "host_ms": statistics.median(times.host) * 1e3,
        "tokens_per_s": case.batch * case.length / step,
        "num_calls": sum(x.num_calls for x in calls),
        "busy_ms": sum(x.milliseconds for x in calls),
    }

    name = args.name or f"profile_{case.family}_{hardware.name}_{options.precision}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / f"{name}.json",
        measured
        | {"hardware": asdict(hardware), "code": asdict(code)}
        | {"times": times._asdict(), "calls": [x._asdict() for x in calls]},
    )

    table = pd.DataFrame(
        [
            {
                "ms": f"{x.milliseconds:.3f}",
                "share": f"{x.milliseconds / measured['busy_ms']:.1%}",
                "calls": f"{x.num_calls:,}",
                "name": f"`{x.name[:80]}`",
            }
            for x in calls[: args.top]
        ]
    ).to_markdown(index=False, disable_numparse=True, colalign=["right"] * 3 + ["left"])
    page = _PAGE.format(**measured, name=name, table=table)
    write_text(args.out / f"{name}.md", page)

    return page


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moxe_plugin.speed.profile",
        description="List what takes the time of a training step.",
    )

    add = parser.add_argument

    add("--family", default="moxe", help="the model family (default: %(default)s)")
    add("--size", default="340m", help="the size (default: %(default)s, Table 1)")
    add("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "autocast"),
        default="bfloat16",
        help="what is computed in (default: %(default)s)",
    )
    add_numbers(
        parser,
        int,
        ("--batch", 64, "sequences of a step"),
        ("--length", 256, "tokens of each"),
        ("--repeats", 5, "steps that are timed"),
        ("--warm-up", 2, "steps before them"),
        ("--top", 40, "rows of the table"),
    )
    add_output_options(parser)

    return parser


if __name__ == "__main__":
    sys.exit(main())
