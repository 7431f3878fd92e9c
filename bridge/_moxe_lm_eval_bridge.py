"""Registers the model ``moxe`` with releases of lm-eval that read no entry points.

Python imports this module at start, through ``moxe_lm_eval_bridge.pth``. All that it
does then is to put a finder in front of ``sys.meta_path``, which waits for
``lm_eval.models``. Once that module has run, the finder has our model registered,
unless lm-eval has done so itself, and leaves.
"""

import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models":
            return None

        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._register_after(spec.loader)
                    return spec

        return None

    def _register_after(self, loader):
        exec_module = loader.exec_module

        def exec_module_and_register(module):
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module_and_register


def _register():
    try:
        from moxe_plugin.eval.registration import register_harness_model

        register_harness_model()
    except Exception as ex:  # noqa: BLE001  # must not break other users of lm-eval
        print(f"moxe_plugin cannot register its model: {ex}", file=sys.stderr)  # noqa: T201


sys.meta_path.insert(0, _Finder())
