"""Tell lm-evaluation-harness of our models, where it does not know already."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Final

_NAME: Final = "moxe"
_TARGET: Final = "moxe_plugin.eval.harness:MoxeHarnessLM"


def register_harness_model() -> None:
    """Register the model, unless an entry point or the ``.pth`` file has."""
    # Not above: once it is imported, the hook of the ``.pth`` file imports this module.
    import lm_eval.models  # noqa: F401  # registers the harness' own models
    from lm_eval.api.registry import model_registry

    if _NAME not in model_registry:
        # As `pyproject.toml` declares it, for releases that do not look there.
        entry_point = EntryPoint(_NAME, _TARGET, "lm_eval.models")
        model_registry.register(_NAME, target=entry_point)


def register_transformers_classes() -> None:
    """Let the harness' own model ``hf`` load exported models of our families."""
    # Importing it registers them.
    import moxe_plugin.hf  # noqa: F401
