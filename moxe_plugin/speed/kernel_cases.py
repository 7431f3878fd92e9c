"""The kernels that are timed: their shapes at Table 1 size, and what they must do.

What a kernel must do is arithmetic, not a measurement: its products' FLOPs, and the
bytes that move if every tensor that one of its passes reads comes from memory once, and
every one that it writes goes there once. Of the mLSTM's squares of pairs of positions
the blocks on the diagonal count whole, and those above it do not. What programs of a
pass read or compute again counts once; gates, stabilisers and normalisers of the mLSTM,
which are smaller by the width of a head, do not count, and neither does the sLSTM's
memory, which is smaller by the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kernel: TypeAlias = Literal["mlstm", "slstm", "scan"]

Phase: TypeAlias = Literal["forward", "train"]

_FLOAT32_BYTES: Final = 4

_BLOCK_SIZE: Final = 64
"""The positions of a block of the mLSTM."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel at one shape, one way or both."""

    kernel: Kernel
    """``mlstm`` and ``slstm`` are what training runs on ragged rows, ``scan`` is the
    sLSTM that carries a memory."""

    phase: Phase
    """``forward``, or ``train``: forward and backward."""

    system: str
    """Whose shape it is."""

    num_experts: int
    """E; 1 for a system without experts."""

    num_rows: int
    """Sequences N of each expert."""

    length: int
    """Positions S of a sequence."""

    num_heads: int
    """H."""

    dim: int
    """The width D of a head."""

    def count_gflop(self) -> float:
        """Count what the products of the kernel take.

        :returns: GFLOP, two for each multiply-add.
        """
        is_mlstm = self.kernel == "mlstm"
        flop = self._count_mlstm_flop() if is_mlstm else self._count_slstm_flop()

        return flop / 1e9

    def count_gbytes(self, element_bytes: int) -> float:
        """Count what moves between the kernel and memory.

        :param element_bytes: The size of a number of the inputs.

        :returns: GB, of ``1e9`` bytes.
        """
        count = {
            "mlstm": self._count_mlstm_bytes,
            "slstm": self._count_slstm_bytes,
            "scan": self._count_scan_bytes,
        }[self.kernel](element_bytes)

        return count / 1e9

    @property
    def _num_cells(self) -> int:
        return self.num_experts * self.num_rows * self.num_heads

    @property
    def _num_elements(self) -> int:
        return self._num_cells * self.length * self.dim

    def _count_mlstm_flop(self) -> int:
        # q k^T and P v; for dq, dh v^T and its product with k; dh v^T again and q k^T
        # again, and each one's product for dk and dv.
        num_products = 2 + 2 + 4 if self.phase == "train" else 2

        num_blocks = -(-self.length // _BLOCK_SIZE)
        num_pairs = num_blocks * (num_blocks + 1) // 2 * _BLOCK_SIZE**2

        return num_products * 2 * self._num_cells * num_pairs * self.dim

    def _count_mlstm_bytes(self, element_bytes: int) -> int:
        # q, k, v, h; k, v, h, dh, dq; q, k, v, dh, dk, dv.
        num_tensors = 4 + 5 + 6 if self.phase == "train" else 4

        return num_tensors * self._num_elements * element_bytes

    def _count_slstm_flop(self) -> int:
        # y R; backwards, R with the gates' gradients, and these with y.
        num_products = 3 if self.phase == "train" else 1

        return num_products * 2 * self._num_elements * 4 * self.dim

    def _count_slstm_bytes(self, element_bytes: int) -> int:
        # Four gates are read and an output is written, of each the inputs' type.
        rounded, exact, num_weights = 4 + 1, 0, 1
        if self.phase == "train":
            # The outputs of the step before are saved, and four activations and c.
            # Backwards, activations, c and the output's gradient are read and 4
            # gradients written; R's gradient reads those and the saved outputs.
            rounded, exact, num_weights = rounded + 1 + 1 + 4 + 5, 5 + 5, 3

        return (
            self._num_elements * (rounded * element_bytes + exact * _FLOAT32_BYTES)
            + num_weights * self._count_weights() * element_bytes
        )

    def _count_scan_bytes(self, element_bytes: int) -> int:
        # R of 16 bits stays on chip, and what moves is what moves in training.
        if element_bytes < _FLOAT32_BYTES:
            return self._count_slstm_bytes(element_bytes)

        # Four gates are read and an output is written.
        num_tensors, num_weights = 4 + 1, 1
        if self.phase == "train":
            # Saved: 5. Backwards, these, the output and its gradient are read and 4
            # gradients written; R's gradient reads those and the output.
            num_tensors, num_weights = num_tensors + 5 + 7 + 4 + 5, 3

        return element_bytes * (
            num_tensors * self._num_elements + num_weights * self._count_weights()
        )

    def _count_weights(self) -> int:
        return self.num_experts * self.num_heads * 4 * self.dim**2


def list_kernel_cases(batch: int, length: int) -> list[KernelCase]:
    """List all kernels at the widths of the paper's Table 1.

    MoxE has four experts of each kind, and every token goes to two of all eight: of a
    batch that routers spread evenly each expert gets a quarter of the positions, here
    of every sequence. The xLSTM has none.

    :param batch: Sequences that the system reads at once.
    :param length: Tokens of each.

    :returns: The cases, forward before train.

    :raises ValueError: A number is not positive, or ``length`` is not a multiple of 4.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value} instead.")

    if length % 4:
        raise ValueError(
            f"`length` must be a multiple of 4, as each of MoxE's experts gets a "
            f"quarter of a sequence, but is {length} instead."
        )

    moxe, xlstm = ("moxe", 4, batch, length // 4, 4), ("xlstm", 1, batch, length, 8)

    kernels: tuple[tuple[Kernel, int, int], ...] = (
        ("mlstm", 320, 256),
        ("slstm", 160, 128),
        ("scan", 160, 128),
    )
    phases: tuple[Phase, ...] = ("forward", "train")

    return [
        KernelCase(
            kernel=kernel,
            phase=phase,
            system=system,
            num_experts=num_experts,
            num_rows=num_rows,
            length=seq_len,
            num_heads=num_heads,
            dim=dim,
        )
        for kernel, *dims in kernels
        for (system, num_experts, num_rows, seq_len, num_heads), dim in zip(
            (moxe, xlstm), dims, strict=True
        )
        for phase in phases
    ]
