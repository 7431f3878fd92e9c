"""Measure a case, and the machine."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from typing import Any, Final

import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import get_dependency_resolver
from torch import nn

from moxe_plugin.allocator import is_freed_memory_kept
from moxe_plugin.bench.machine import describe_code, describe_hardware, list_versions
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.flops import forward_flops_per_token
from moxe_plugin.models.moxe.config import MOXE_FAMILY
from moxe_plugin.speed import memory
from moxe_plugin.speed.clock import time_repeats
from moxe_plugin.speed.limits import (
    least_memory_seconds,
    measure_limits,
    new_gradient_seconds,
)
from moxe_plugin.speed.nxai import create_nxai_model
from moxe_plugin.speed.options import MeasureOptions
from moxe_plugin.speed.records import SpeedRow
from moxe_plugin.speed.routers import ExpertLoads, skew_routers
from moxe_plugin.speed.suites import SpeedCase
from moxe_plugin.speed.swapping import swapped_linear
from moxe_plugin.speed.workloads import (
    PARAMETER_DTYPES,
    Workload,
    prepare_workload,
)

_COMPUTE_DTYPES: Final = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "autocast": "bfloat16",
}
"""What matrix products are computed in, by precision."""

_GIB: Final = 2**30


def describe_machine(options: MeasureOptions) -> dict[str, Any]:
    """Describe the machine and measure what it allows.

    :param options: How cases are measured.

    :returns: Plain values: as :class:`~moxe_plugin.report.records.Hardware`, and
        ``num_cores``, ``versions``, ``code``, ``allocator`` (what the environment says
        to it), ``freed_memory`` (``kept`` or ``returned``, as was tried), and what
        :func:`~moxe_plugin.speed.limits.measure_limits` returns.
    """
    device = options.device

    gpu_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    hardware = describe_hardware(device.type, gpu_name, torch.get_num_threads(), 1)

    return {
        **asdict(hardware),
        "num_cores": len(os.sched_getaffinity(0)),
        "versions": list_versions(),
        "code": asdict(describe_code()),
        "allocator": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
        },
        "freed_memory": "kept" if is_freed_memory_kept() else "returned",
        **measure_limits(options),
    }


def measure_case(
    case: SpeedCase, machine: Mapping[str, Any], options: MeasureOptions
) -> SpeedRow:
    """Create a model and time it.

    :param case: The case.
    :param machine: What :func:`describe_machine` returned.
    :param options: How to measure.

    :returns: What was measured; without numbers if an accelerator's memory was too
        small.

    :raises ValueError: The architecture is not registered, or its configuration is not
        valid.
    """
    config = _find_config(case, options)
    flops_per_token = forward_flops_per_token(config, case.length)

    # A backward pass takes two products for each one.
    passes = 3 if case.phase == "train" else 1

    row = SpeedRow(
        **{f.name: getattr(case, f.name) for f in fields(case)},
        device=str(options.device),
        dtype=options.precision,
        repeats=options.repeats,
        warm_up=options.warm_up,
        seed=options.seed,
        checkpoint_layers=options.checkpoint_layers
        and (case.phase, case.implementation) == ("train", "own"),
        router_skew=options.router_skew if case.family == MOXE_FAMILY else 0.0,
    )

    swap = swapped_linear() if case.linear == "swapped" else nullcontext()

    try:
        with swap:
            row = _time(row, case, config, machine, options)
    except torch.OutOfMemoryError:
        return row
    finally:
        memory.release_memory(options.device)

    assert row.tokens is not None
    assert row.seconds is not None

    useful_gflop = passes * flops_per_token * row.tokens / 1e9
    peak = machine["matmul_gflop_per_s"][_COMPUTE_DTYPES[options.precision]]

    return replace(
        row,
        tokens_per_s=row.tokens / row.seconds,
        useful_gflop=useful_gflop,
        peak_fraction=useful_gflop / row.seconds / peak,
    )


def create_workload(case: SpeedCase, options: MeasureOptions) -> Workload:
    """Create a model of this package, and what is timed of it.

    :param case: The case.
    :param options: How to measure.

    :returns: The workload.

    :raises ValueError: As :func:`measure_case`.
    """
    config = _find_config(case, options)

    return _prepare(_create_model(case.family, config, options), case, config, options)


def _prepare(
    model: nn.Module, case: SpeedCase, config: Any, options: MeasureOptions
) -> Workload:
    return prepare_workload(
        model,
        case,
        vocab_size=config.vocab_size,
        precision=options.precision,
        num_calls=options.num_calls,
        decode_tokens=options.decode_tokens,
        chunk_len=options.chunk_len,
    )


def _find_config(case: SpeedCase, options: MeasureOptions) -> Any:
    family = get_dependency_resolver().resolve(ModelFamily, key=case.family)

    config: Any = family.maybe_get_arch_config(case.arch)
    if config is None:
        raise ValueError(
            f"`arch` must be a registered architecture, but '{case.family}' has no "
            f"'{case.arch}'."
        )

    num_tokens = case.length
    if case.phase == "decode":
        num_tokens += options.num_calls * options.decode_tokens

    # The transformers read no more.
    max_seq_len = max(config.max_seq_len, num_tokens)

    config = replace(config, **{"max_seq_len": max_seq_len, **case.overrides})

    result = config.validate()
    if result.has_error():
        raise ValueError(
            f"`overrides` ({dict(case.overrides)}) must fit '{case.family}' "
            f"'{case.arch}', but: {'; '.join(result.errors)}"
        )

    return config


def _time(
    row: SpeedRow,
    case: SpeedCase,
    config: Any,
    machine: Mapping[str, Any],
    options: MeasureOptions,
) -> SpeedRow:
    device = options.device

    memory.release_memory(device)

    baseline = memory.read_memory(device)

    model: nn.Module
    if case.implementation == "nxai":
        model = create_nxai_model(config, case.length)
        model = model.to(PARAMETER_DTYPES[options.precision])
    else:
        model = _create_model(case.family, config, options)

    if row.router_skew:
        skew_routers(model, row.router_skew, options.seed)

    if row.checkpoint_layers:
        family = get_dependency_resolver().resolve(ModelFamily, key=case.family)
        family.apply_layerwise_ac(model, every_nth_layer=1)

    workload = _prepare(model, case, config, options)

    # Freed memory that is kept would show in the peak.
    memory.release_memory(device)

    loads = ExpertLoads(model)
    # What a graph launches calls no hooks.
    with nullcontext() if case.captured else loads.counted():
        time_repeats(workload.call, options.warm_up, device)

    is_reset = memory.reset_peak_memory(device)
    seconds_all = time_repeats(workload.call, options.repeats, device)
    peak = memory.read_peak_memory(device) if is_reset else None

    if case.phase == "train":
        row = replace(
            row,
            least_memory_seconds=least_memory_seconds(model, machine),
            new_gradient_seconds=new_gradient_seconds(model, machine),
        )

    return replace(
        row,
        busiest_expert_share=loads.busiest_share(),
        num_parameters=sum(p.numel() for p in model.parameters()),
        tokens=workload.num_tokens,
        seconds=statistics.median(seconds_all),
        seconds_all=seconds_all,
        peak_memory_gib=None if peak is None else peak / _GIB,
        baseline_memory_gib=None if baseline is None else baseline / _GIB,
        state_bytes=workload.count_state_bytes(),
    )


def _create_model(
    family_name: str, config: Any, options: MeasureOptions
) -> AuxLossCausalLM:
    family = get_dependency_resolver().resolve(ModelFamily, key=family_name)

    torch.manual_seed(options.seed)

    model = family.create_new_model(
        config,
        create_fake_gangs(options.device),
        PARAMETER_DTYPES[options.precision],
        meta=False,
        init_rank0_only=False,
    )
    assert isinstance(model, AuxLossCausalLM)

    return model
