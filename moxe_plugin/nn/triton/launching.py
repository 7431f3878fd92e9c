"""Launch kernels with little work for the host, which a training step waits for.

For each launch, Triton finds out anew what its arguments want a kernel to be compiled
for: some 25 us of Python, about what a kernel of a training step takes a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor
from triton.runtime.jit import JITFunction

_ALIGNMENT: Final = 16


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

        :returns: Takes the kernel's arguments, the first of which is a tensor, and its
            constants and Triton's options by name.
        """
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if not self._is_compiled:
            self.kernel[grid](*args, **constants)

            return

        key = (args[0].get_device(), *map(_specialize, args), *constants.values())
        known = self._known.get(key)

        if known is None:
            compiled = self.kernel[grid](*args, **constants)
            names = self.kernel.arg_names[len(args) :]
            self._known[key] = compiled, tuple(constants[name] for name in names)

            return

        compiled, tail = known
        compiled[(*grid, 1, 1)[:3]](*args, *tail)


def _specialize(arg: object) -> object:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % _ALIGNMENT == 0
    if isinstance(arg, int):
        return 1 if arg == 1 else (arg % _ALIGNMENT == 0, arg.bit_length() > 31)

    return type(arg)
