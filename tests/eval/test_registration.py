"""Tests of how lm-evaluation-harness learns of the model, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BRIDGE = Path(__file__).parents[2] / "bridge"


def run_python(code: str) -> str:
    """Run code after the ``.pth`` file of the checkout, installed or not."""
    # Before an installed copy of the module, which then is not imported.
    path = os.pathsep.join(filter(None, [str(BRIDGE), os.environ.get("PYTHONPATH")]))
    code = f"import site; site.addsitedir({str(BRIDGE)!r}); {code}"

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

    return result.stdout.strip()


def test_the_bridge_registers_the_model_without_importing_it() -> None:
    code = (
        "import lm_eval.models, sys;"
        "from lm_eval.api.registry import model_registry, get_model;"
        "print('moxe' in model_registry, 'moxe_plugin.eval.harness' in sys.modules);"
        "print('moxe_plugin.hf' in sys.modules, 'fairseq2' in sys.modules);"
        "print(get_model('moxe').__name__)"
    )

    assert run_python(code).split() == [
        *("True", "False", "False", "False", "MoxeHarnessLM"),
    ]


def test_the_bridge_tells_the_model_hf_of_our_classes_and_leaves() -> None:
    code = (
        "import sys, importlib.util as u, transformers.utils, types;"
        # lm-eval's `hf` imports it, but only several devices need it.
        "n = ['accelerate', 'accelerate.utils'];"
        "names = dict.fromkeys(['Accelerator', 'InitProcessGroupKwargs',"
        " 'find_executable_batch_size', 'get_max_memory']);"
        "a = [types.ModuleType(m) for m in n]; [m.__dict__.update(names) for m in a];"
        "u.find_spec('accelerate') or sys.modules.update(zip(n, a));"
        "from lm_eval.api.registry import get_model; import lm_eval.models;"
        "import _moxe_lm_eval_bridge as b;"
        "print(any(type(f) is b._Finder for f in sys.meta_path));"
        "get_model('hf'); from transformers import AutoConfig;"
        "print(AutoConfig.for_model('moxe').__class__.__name__);"
        "print('fairseq2' in sys.modules);"
        "print(any(type(f) is b._Finder for f in sys.meta_path))"
    )

    assert run_python(code).split() == ["True", "MoxEConfig", "False", "False"]


def test_the_bridge_imports_nothing_at_start() -> None:
    code = (
        "import sys; assert '_moxe_lm_eval_bridge' in sys.modules;"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in"
        " ('importlib_metadata', 'lm_eval', 'logging', 'moxe_plugin', 'torch')))"
    )

    assert run_python(code) == "[]"


def test_the_bridge_leaves_a_registered_model_alone() -> None:
    # As a later lm-eval will do: its own reading of the same entry point.
    code = (
        "import sys; import _moxe_lm_eval_bridge;"
        "from importlib.metadata import EntryPoint;"
        "from lm_eval.api.registry import model_registry as r;"
        "e = EntryPoint('moxe', 'moxe_plugin.eval.harness:MoxeHarnessLM',"
        " 'lm_eval.models');"
        "r.register('moxe', target=e); import lm_eval.models;"
        "r.register('moxe', target=e); print(r._objs['moxe'] is e)"
    )

    assert run_python(code) == "True"


def test_our_module_may_come_before_the_harness() -> None:
    code = (
        "import moxe_plugin.eval.registration as r, sys; sys.stderr = sys.stdout;"
        "r.register_harness_model();"
        "from lm_eval.api.registry import model_registry;"
        "print('moxe' in model_registry)"
    )

    assert run_python(code) == "True"
