"""Time of a forward pass by the length of the text: measured, stored, summed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from moxe_plugin.console import Stage, Stages
from moxe_plugin.report.files import read_json, write_json

TIME_LENGTHS: Final = (256, 512, 1024, 2048, 4096)
"""Lengths of the text in tokens."""

TIMED_SYSTEMS: Final[Sequence[str]] = (
    "moxe",
    "moxe_token",
    "moxe_dense",
    "xlstm",
)
"""Systems whose time is measured, if they were trained: those that read a text of any
length. The transformers end at ``max_seq_len``."""

_TIME_FILE: Final = "time.json"


def time_calls(
    calls: Mapping[str, Callable[[int], None]],
    lengths: Sequence[int],
    num_rounds: int,
    *,
    stage: Stage,
) -> dict[str, list[list[float]]]:
    """Time calls of several systems in turns.

    A round goes through all lengths and, at each length, through all systems, so that
    a machine that slows down slows all of them down. One round before the first warms
    up and is not kept.

    :param calls: Runs a system on a text of a length, to the end.
    :param lengths: The lengths.
    :param num_rounds: How often to repeat.
    :param stage: Advances after each round.

    :returns: Seconds by system, round and length.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}

    for _ in stage.over(range(1 + num_rounds)):
        for times in seconds.values():
            times.append([])

        for length in lengths:
            for name, call in calls.items():
                begin = time.perf_counter()
                call(length)
                seconds[name][-1].append(time.perf_counter() - begin)

    return {name: times[1:] for name, times in seconds.items()}


def time_exponents(
    seconds: Sequence[Sequence[float]], lengths: Sequence[int]
) -> list[float]:
    """Fit the power of the length that time grows with, once for each round.

    :param seconds: Seconds by round and length.
    :param lengths: The lengths.

    :returns: The least-squares slope of log time on log length, by round.
    """
    x = np.log(np.asarray(lengths, dtype=np.float64))
    x -= x.mean()

    return [float(x @ np.log(np.asarray(row)) / (x @ x)) for row in seconds]


def time_runs(
    runs: Mapping[str, Path],
    text: Path,
    *,
    lengths: Sequence[int],
    num_rounds: int,
    device_name: str,
    stages: Stages,
) -> dict[str, Any]:
    """Time trained systems on one text, one sequence at a time.

    :param runs: The training output of each system.
    :param text: The text; its documents are strung together.
    :param lengths: The lengths in tokens.
    :param num_rounds: How often to repeat.
    :param device_name: Where to compute.
    :param stages: Shows progress; must not draw while a system is timed.

    :returns: Plain values: ``lengths``, ``seconds`` by system, round and length,
        ``hardware`` and ``versions``.

    :raises ValueError: The text is shorter than the longest length.
    """
    import torch

    from moxe_plugin.bench.machine import describe_hardware, list_versions
    from moxe_plugin.claims.held_out import read_documents
    from moxe_plugin.eval.checkpoints import load_checkpoint
    from moxe_plugin.eval.scoring import compute_logits
    from moxe_plugin.eval.text_codec import TextCodec

    device = torch.device(device_name)

    def load(run: Path) -> Callable[[int], None]:
        loaded = load_checkpoint(run, device=device)
        codec = TextCodec(loaded.tokenizer, None, add_bos_token=False)

        documents = read_documents(text, codec.encode, max(lengths)).token_ids
        ids = np.concatenate(documents)[: max(lengths)].tolist()

        if len(ids) < max(lengths):
            raise ValueError(
                f"`{text}` must have {max(lengths)} tokens, but has {len(ids)}."
            )

        def call(length: int) -> None:
            compute_logits(loaded.model, [ids[:length]])
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return call

    calls = {system: load(run) for system, run in runs.items()}

    gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    hardware = describe_hardware(device.type, gpu_name, torch.get_num_threads(), 1)

    with stages.start("Timing, in rounds", 1 + num_rounds) as stage:
        seconds = time_calls(calls, lengths, num_rounds, stage=stage)

    return {
        "lengths": list(lengths),
        "seconds": seconds,
        "hardware": asdict(hardware),
        "versions": list_versions(),
    }


def write_times(directory: Path, times: Mapping[str, Any]) -> None:
    """Write what :func:`time_runs` measured.

    :param directory: Where the file goes.
    :param times: The times.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / _TIME_FILE, times)


def read_times(directory: Path) -> dict[str, Any] | None:
    """Read what :func:`time_runs` measured.

    :param directory: Where the file is.

    :returns: The times; ``None`` if none were measured.
    """
    file = directory / _TIME_FILE

    return read_json(file) if file.exists() else None
