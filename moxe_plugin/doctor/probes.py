"""What the doctor runs in child processes; prints a finding, or raises."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from moxe_plugin.doctor.checks import FINDING_PREFIX, WARNING_PREFIX


class Shortcoming(str):
    """A finding that is no failure, but should be better."""

    __slots__ = ()


def probe_extension() -> str:
    """Look up what our extension registers with fairseq2.

    :returns: The finding.

    :raises LookupError: Something is not registered.
    """
    from fairseq2.data.tokenizers import TokenizerFamily
    from fairseq2.datasets import DatasetFamily
    from fairseq2.models import ModelFamily
    from fairseq2.runtime.dependency import get_dependency_resolver

    expected: dict[type, set[str]] = {
        ModelFamily: {"moxe", "xlstm", "gemma2", "qwen_moe"},
        DatasetFamily: {"moxe_tokens", "moxe_instructions"},
        TokenizerFamily: {"moxe_hg"},
    }

    resolver = get_dependency_resolver()

    for kls, names in expected.items():
        missing = names.difference(map(str, resolver.iter_keys(kls)))
        if missing:
            raise LookupError(f"{kls.__name__} without {', '.join(sorted(missing))}")

    return ", ".join(sorted(set.union(*expected.values())))


def probe_lm_eval() -> str:
    """Look up ``--model moxe`` as lm-evaluation-harness does.

    :returns: The finding.
    """
    import lm_eval.models
    from lm_eval.api.registry import get_model

    del lm_eval  # imported for what it registers

    model = get_model("moxe")

    return f"moxe = {model.__module__}:{model.__qualname__}"


def probe_cache() -> str:
    """Write to the directory of the embedded data.

    :returns: The finding.

    :raises PermissionError: The directory cannot be written.
    """
    from moxe_plugin.data.corpus import get_cache_dir

    directory = get_cache_dir()
    directory.mkdir(parents=True, exist_ok=True)

    if not os.access(directory, os.W_OK):
        raise PermissionError(f"'{directory}' cannot be written.")

    return str(directory)


def probe_device() -> str:
    """Run an operation on the GPU, if there is one.

    :returns: The finding.
    """
    import torch

    if not torch.cuda.is_available():
        return f"no GPU; {torch.get_num_threads()} threads on the CPU"

    properties = torch.cuda.get_device_properties(0)
    torch.ones(1, device="cuda").sum().item()

    memory_gib = properties.total_memory / 2**30

    return f"{properties.name}, {memory_gib:.0f} GiB, CUDA {torch.version.cuda}"


def probe_native() -> str:
    """Compile and load the C++ for CPUs, and tell what does not run in it, and why.

    :returns: The finding; a shortcoming if there is no C++ at all, which is slow.
    """
    from moxe_plugin.nn.native.library import why_not_loaded
    from moxe_plugin.nn.products import rounds_to_bfloat16, why_torch

    products = why_torch()

    if reason := why_not_loaded("slstm_scan"):
        return Shortcoming(f"no C++, which is slow on a CPU: {_shorten(reason)}")

    reasons = {
        "sLSTM": None,
        "convolution": why_not_loaded("causal_conv"),
        "norms": why_not_loaded("scale_norm"),
        "gates": why_not_loaded("gating"),
        "router": why_not_loaded("router"),
        "dispatch": why_not_loaded("row_dispatch"),
        "loss": why_not_loaded("cross_entropy"),
        "float32 products": products,
        # It multiplies by them.
        "mLSTM": products
        or why_not_loaded("mlstm_parallel")
        or why_not_loaded("mlstm_chunkwise")
        or why_not_loaded("mlstm_projections"),
        "bfloat16 products": products
        or (None if rounds_to_bfloat16() else "torch uses the processor's AMX"),
    }
    others: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            others.setdefault(reason, []).append(name)

    return "; ".join(
        [
            f"C++: {', '.join(n for n, reason in reasons.items() if reason is None)}",
            *(
                f"torch: {', '.join(names)} ({_shorten(reason)})"
                for reason, names in others.items()
            ),
        ]
    )


def _shorten(reason: str) -> str:
    # A compiler explains itself on many lines.
    return " ".join(reason.split())[:_MAX_REASON_LEN]


_MAX_REASON_LEN: Final = 200
"""In characters."""

_PROBES: Final = {
    "device": probe_device,
    "extension": probe_extension,
    "cache": probe_cache,
    "native": probe_native,
    "lm_eval": probe_lm_eval,
}


def main(names: Sequence[str]) -> None:
    """Run probes, until one raises an error.

    :param names: Which ones.
    """
    for name in names:
        finding = _PROBES[name]()
        prefix = WARNING_PREFIX if isinstance(finding, Shortcoming) else FINDING_PREFIX

        # Read by the parent process, as soon as it is known.
        print(prefix + finding, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
