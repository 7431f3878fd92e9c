"""Launch kernels with little work for the host, which a training step waits for.

For each launch, Triton finds out anew what its arguments want a kernel to be compiled
for: work in Python that can take as long as the kernel takes a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_ALIGNMENT: Final = 16

_HOOKS: Final = triton.knobs.runtime

_MAX_INT32: Final = 2**31 - 1


class Launcher:
    """Launches a kernel as Triton does, but remembers what has been compiled for what.

    Triton compiles a kernel for the types of its arguments, and for whether integers
    and addresses in bytes divide by 16, and integers are 1. Used as a decorator above
    ``@triton.jit``, of a kernel whose constants come last.

    :param kernel: The kernel, or what Triton's interpreter has in its place.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._is_compiled = isinstance(kernel, JITFunction)
        self._known: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Prepare a launch.

        :param grid: The numbers of programs, in up to three dimensions.

        :returns: Takes the kernel's arguments, which are tensors, the first of them, or
            of the types int and float, and its constants and Triton's options by name.
        """
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if not self._is_compiled:
            self.kernel[grid](*args, **constants)

            return

        key: list[object] = [args[0].get_device(), *constants.values()]
        # Addresses, as Triton would ask CUDA about each tensor
        values: list[object] = []
        for arg in args:
            kind = type(arg)
            if kind is int:
                is_long = arg > _MAX_INT32
                key.append(
                    arg if arg < 2 else 2 + (arg % _ALIGNMENT == 0) + 2 * is_long
                )
                values.append(arg)
            elif kind is float:
                values.append(arg)
            else:
                address = arg.data_ptr()
                key.append(arg.dtype)
                if address % _ALIGNMENT:
                    key.append(address % _ALIGNMENT)
                values.append(address)
        known = self._known.get(tuple(key))

        if known is None:
            compiled = self.kernel[grid](*args, **constants)
            names = self.kernel.arg_names[len(args) :]
            self._known[tuple(key)] = compiled, tuple(constants[x] for x in names)

            return

        compiled, tail = known
        sizes = (*grid, 1, 1)[:3]

        # A profiler's
        hooks = _HOOKS
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[sizes](*args, *tail)

            return

        # What the line above does without them
        stream = driver.active.get_current_stream(key[0])
        compiled.run(
            *(*sizes, stream, compiled.function, compiled.packed_metadata),
            *(None, None, None, *values, *tail),
        )
