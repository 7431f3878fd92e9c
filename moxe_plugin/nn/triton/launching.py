"""Launch kernels with little work for the host, which a training step waits for.

For each launch, Triton finds out anew what its arguments want a kernel to be compiled
for: work in Python that can take as long as the kernel takes a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any, Final

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_ALIGNMENT: Final = 16

_HOOKS: Final = triton.knobs.runtime

_MAX_INT32: Final = 2**31 - 1

_MAX_KNOWN: Final = 256
"""How many launches of a kernel are remembered with their numbers."""


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
        self._num_tensors: int | None = None
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}
        self._known_kinds: dict[object, tuple[Any, tuple[object, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Prepare a launch.

        :param grid: The numbers of programs, in up to three dimensions.

        :returns: Takes the kernel's arguments, at least one tensor, then numbers, and
            its constants and Triton's options by name, in the same order each time. It
            raises :class:`TypeError` for a tensor after a number.
        """
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if self._num_tensors is None:
            self._num_tensors = _count_tensors(args)

        if not self._is_compiled:
            self.kernel[grid](*args, **constants)

            return

        tensors, numbers = args[: self._num_tensors], args[self._num_tensors :]
        # Triton would ask each tensor, and CUDA whether that is an address.
        addresses = [x.data_ptr() for x in tensors]
        device = tensors[0].get_device()
        kinds = device, *constants.values(), *[x.dtype for x in tensors]
        if reduce(or_, addresses) % _ALIGNMENT:
            kinds += tuple([x % _ALIGNMENT for x in addresses])

        known = self._known.get((kinds, numbers))
        if known is None:
            of_kind = kinds, tuple([_classify(x) for x in numbers])
            known = self._known_kinds.get(of_kind)

            if known is None:
                compiled = self.kernel[grid](*args, **constants)
                names = self.kernel.arg_names[len(args) :]
                known = compiled, tuple(constants[x] for x in names)
                self._known_kinds[of_kind] = known

                return

            # Ragged rows have other numbers at each step.
            if len(self._known) < _MAX_KNOWN:
                self._known[kinds, numbers] = known

        compiled, tail = known
        sizes = (*grid, 1, 1)[:3]

        # A profiler's
        hooks = _HOOKS
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[sizes](*args, *tail)

            return

        # What the line above does without them
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *(*sizes, stream, compiled.function, compiled.packed_metadata),
            *(None, None, None, *addresses, *numbers, *tail),
        )


def _count_tensors(args: Sequence[object]) -> int:
    are_tensors = [isinstance(x, Tensor) for x in args]
    count = sum(are_tensors)

    if not all(are_tensors[:count]) or count == 0:
        raise TypeError("A kernel must take tensors before numbers, at least one.")

    return count


def _classify(number: float) -> object:
    # What Triton compiles for: whether an integer is 1, and divides, and is long
    if isinstance(number, float):
        return float

    if number == 1:
        return 1

    return number % _ALIGNMENT == 0, number > _MAX_INT32, number < -_MAX_INT32 - 1
