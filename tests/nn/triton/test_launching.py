"""Tests of `moxe_plugin.nn.triton.launching`: what is compiled for what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moxe_plugin.nn.triton import launching
from moxe_plugin.nn.triton.launching import Launcher


class Kernel:
    """Records what Triton would be asked to compile, and how it is launched again."""

    arg_names = ("x", "size", "eps", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.relaunched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:  # noqa: D105  # as Triton has it
        def launch(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))

            return SimpleNamespace(
                run=lambda *x: self.relaunched.append(x),
                function="function",
                packed_metadata="metadata",
            )

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "JITFunction", Kernel)
    streams = SimpleNamespace(get_current_stream=lambda _: "stream")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=streams))

    return Kernel()


def test_a_second_launch_does_not_ask_triton(kernel: Kernel) -> None:
    launcher, x = Launcher(kernel), torch.zeros(32)

    launcher[(3,)](x, 17, 1e-5, BLOCK=64, num_warps=4)
    launcher[5, 2](x, 19, 1e-6, BLOCK=64, num_warps=4)

    ((grid, args, constants),) = kernel.compiled
    assert (grid, args) == ((3,), (x, 17, 1e-5))
    assert constants == {"BLOCK": 64, "num_warps": 4}
    # Constants follow the arguments, Triton's options do not.
    head, args = kernel.relaunched[0][:9], kernel.relaunched[0][9:]
    assert head == (5, 2, 1, "stream", "function", "metadata", None, None, None)
    # An address is one argument less for Triton to ask CUDA about.
    assert args == (x.data_ptr(), 19, 1e-6, 64)


@pytest.mark.parametrize(
    ("x", "size", "block"),
    [
        pytest.param(torch.zeros(32, dtype=torch.bfloat16), 17, 64, id="type"),
        pytest.param(torch.zeros(33)[1:], 17, 64, id="alignment"),
        pytest.param(torch.zeros(32), 32, 64, id="divisible"),
        pytest.param(torch.zeros(32), 1, 64, id="one"),
        pytest.param(torch.zeros(32), 2**31 + 1, 64, id="long"),
        pytest.param(torch.zeros(32), -(2**31) - 1, 64, id="long-negative"),
        pytest.param(torch.zeros(32), 17, 32, id="constant"),
    ],
)
def test_other_arguments_are_compiled_for(
    kernel: Kernel, x: torch.Tensor, size: int, block: int
) -> None:
    launcher = Launcher(kernel)

    # The second time it is remembered with its numbers.
    launcher[(1,)](torch.zeros(32), 17, 1e-5, BLOCK=64)
    launcher[(1,)](torch.zeros(32), 17, 1e-5, BLOCK=64)
    launcher[(1,)](x, size, 1e-5, BLOCK=block)

    assert len(kernel.compiled) == 2
    assert len(kernel.relaunched) == 1


def test_another_device_is_compiled_for(kernel: Kernel) -> None:
    class ElsewhereTensor(torch.Tensor):
        def get_device(self) -> int:
            return 1

    launcher, x = Launcher(kernel), torch.zeros(32)

    for _ in range(2):
        launcher[(1,)](x, 17, 1e-5, BLOCK=64)
        launcher[(1,)](x.as_subclass(ElsewhereTensor), 17, 1e-5, BLOCK=64)

    assert len(kernel.compiled) == 2
    assert len(kernel.relaunched) == 2


def test_other_numbers_of_the_same_kind_are_not_compiled_for(kernel: Kernel) -> None:
    launcher, x = Launcher(kernel), torch.zeros(32)

    for size in range(17, 17 + 16 * launching._MAX_KNOWN, 16):
        launcher[(1,)](x, size, 1e-5, BLOCK=64)
        launcher[(1,)](x, size, 1e-5, BLOCK=64)
    # More are not remembered, but launched.
    launcher[(1,)](x, 2**20 + 1, 1e-5, BLOCK=64)

    assert len(kernel.compiled) == 1
    assert kernel.relaunched[-1][10] == 2**20 + 1
    assert len(launcher._known) <= launching._MAX_KNOWN


def test_tensors_come_before_numbers(kernel: Kernel) -> None:
    x = torch.zeros(32)

    for args in ((17, 1e-5), (x, 17, x)):
        with pytest.raises(TypeError, match="tensors before numbers, at least one"):
            Launcher(kernel)[(1,)](*args, BLOCK=64)

    assert not kernel.compiled


def test_what_is_interpreted_is_launched_by_triton() -> None:
    kernel = Kernel()
    launcher = Launcher(kernel)

    for _ in range(2):
        launcher[(1,)](torch.zeros(32), 17, 1e-5, BLOCK=64)

    assert len(kernel.compiled) == 2
