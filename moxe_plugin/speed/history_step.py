"""Time a training step of MoxE in whatever version of this package stands first.

A script for :mod:`moxe_plugin.speed.history`, which gives its text to an interpreter in
the directory of an older commit: it uses what all versions have. Its arguments are the
architecture, the number of sequences and their length, calls before, calls that are
timed, and threads. It prints seconds of each call as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def _main() -> None:
    import torch
    from fairseq2 import init_fairseq2
    from fairseq2.gang import create_fake_gangs
    from fairseq2.models import ModelFamily
    from fairseq2.nn import BatchLayout
    from fairseq2.runtime.dependency import get_dependency_resolver

    import moxe_plugin

    arch, *numbers = sys.argv[1:]
    batch, length, warm_up, repeats, num_threads = map(int, numbers)

    torch.set_num_threads(num_threads)
    torch.manual_seed(1)

    init_fairseq2()

    family = get_dependency_resolver().resolve(ModelFamily, key="moxe")
    config: Any = family.maybe_get_arch_config(arch)
    model = family.create_new_model(
        config,
        create_fake_gangs(torch.device("cpu")),
        torch.float32,
        meta=False,
        init_rank0_only=False,
    )
    model.train()

    ids = torch.randint(0, config.vocab_size, (batch, length + 1))
    seqs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    seconds = []
    for _ in range(warm_up + repeats):
        begin = time.perf_counter()
        loss = model(seqs, BatchLayout.of(seqs), targets, reduction="mean")
        getattr(loss, "aggregate", loss).backward()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)

    result = {"package": moxe_plugin.__file__, "seconds": seconds[warm_up:]}
    sys.stdout.write(f"{json.dumps(result)}\n")


if __name__ == "__main__":
    _main()
