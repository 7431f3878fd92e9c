"""What the doctor runs in child processes; prints a finding, or raises."""

from __future__ import annotations

import os
import sys
from typing import Final

from moxe_plugin.doctor.checks import FINDING_PREFIX


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


_PROBES: Final = {
    "device": probe_device,
    "extension": probe_extension,
    "cache": probe_cache,
    "lm_eval": probe_lm_eval,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        # Read by the parent process, as soon as it is known.
        print(FINDING_PREFIX + _PROBES[name](), flush=True)  # noqa: T201
