"""Tells lm-eval of the model ``moxe``, and its model ``hf`` of our model classes.

Python imports this module at start, through ``moxe_lm_eval_bridge.pth``. All that it
does then is to put a finder in front of ``sys.meta_path``, which waits for two modules.
Once ``lm_eval.models`` has run, the finder has our model registered, for releases of
lm-eval that read no entry points. Once ``lm_eval.models.huggingface`` has run, it has
our classes registered with transformers, so that ``hf`` loads exported models. Then it
leaves.
"""

import sys


def _register_model():
    from moxe_plugin.eval.registration import register_harness_model

    register_harness_model()


def _register_classes():
    from moxe_plugin.eval.registration import register_transformers_classes

    register_transformers_classes()


class _Finder:
    def __init__(self):
        self._actions = {
            "lm_eval.models": _register_model,
            "lm_eval.models.huggingface": _register_classes,
        }

    def find_spec(self, name, path=None, target=None):
        if name not in self._actions:
            return None

        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._act_after(name, spec.loader)
                    return spec

        return None

    def _act_after(self, name, loader):
        exec_module = loader.exec_module

        def exec_module_and_act(module):
            exec_module(module)
            action = self._actions.pop(name, None)
            if not self._actions and self in sys.meta_path:
                sys.meta_path.remove(self)
            if action is not None:
                _try(action)

        loader.exec_module = exec_module_and_act


def _try(action):
    try:
        action()
    except Exception as ex:  # noqa: BLE001  # must not break other users of lm-eval
        print(f"moxe_plugin cannot register its models: {ex}", file=sys.stderr)  # noqa: T201


sys.meta_path.insert(0, _Finder())
