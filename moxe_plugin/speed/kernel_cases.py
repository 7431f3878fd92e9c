"""The kernels that are timed: their shapes at Table 1 size, and what they must do.

What a kernel must do is arithmetic, not a measurement: its products' FLOPs, and the
bytes that move if every tensor that one of its passes reads comes from memory once, and
every one that it writes goes there once. What tiles read or compute again counts once,
and padding up to whole chunks counts; gates, stabilisers and normalisers of the mLSTM,
which are smaller by the width of a head, do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kernel: TypeAlias = Literal["mlstm", "slstm", "grouped"]

Phase: TypeAlias = Literal["forward", "train"]

_FLOAT32_BYTES: Final = 4

_CHUNK_SIZE: Final = 64
"""As the mLSTM block asks the kernels for."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel at one shape, one way or both."""

    kernel: Kernel
    """``mlstm``, ``slstm``, or ``grouped``, the product of rows with their expert's
    weight."""

    phase: Phase
    """``forward``, or ``train``: forward and backward."""

    system: str
    """Whose shape it is."""

    num_experts: int
    """E; 1 for a system without experts."""

    num_rows: int
    """Sequences N of each expert, or, of ``grouped``, rows of each."""

    length: int
    """Positions S of a sequence; 1 for ``grouped``."""

    num_heads: int
    """H; 1 for ``grouped``."""

    dim: int
    """The width D of a head, or of a row that ``grouped`` reads."""

    out_dim: int
    """D, or the width of a row that ``grouped`` writes."""

    def count_gflop(self) -> float:
        """Count what the products of the kernel take.

        :returns: GFLOP, two for each multiply-add.
        """
        flop = {
            "mlstm": self._count_mlstm_flop,
            "slstm": self._count_slstm_flop,
            "grouped": self._count_grouped_flop,
        }[self.kernel]()

        return flop / 1e9

    def count_gbytes(self, element_bytes: int) -> float:
        """Count what moves between the kernel and memory.

        :param element_bytes: The size of a number of the inputs.

        :returns: GB, of ``1e9`` bytes.
        """
        count = {
            "mlstm": self._count_mlstm_bytes,
            "slstm": self._count_slstm_bytes,
            "grouped": self._count_grouped_bytes,
        }[self.kernel](element_bytes)

        return count / 1e9

    @property
    def _num_cells(self) -> int:
        return self.num_experts * self.num_rows * self.num_heads

    @property
    def _num_chunks(self) -> int:
        return self._num_cells * -(-self.length // _CHUNK_SIZE)

    def _count_mlstm_flop(self) -> int:
        # Of a chunk, k^T v and q C with C (D,D), and q k^T and P v with pairs (L,L).
        per_state, per_pair = 2, 2
        if self.phase == "train":
            # Into C, and with dC or C into dq, dk, dv; dh v^T, q k^T again, and each of
            # dq, dk, dv.
            per_state, per_pair = 2 + 4, 2 + 5

        positions = self._num_chunks * _CHUNK_SIZE

        return (
            2 * positions * self.dim * (per_state * self.dim + per_pair * _CHUNK_SIZE)
        )

    def _count_mlstm_bytes(self, element_bytes: int) -> int:
        # States are written and read; k, v; q, k, v, h.
        per_state, per_position = 2, 6
        if self.phase == "train":
            # C read twice, dC written and read twice; q, dh; q, k, v, dh, dq, dk; q,
            # k, dh, dv.
            per_state, per_position = 2 + 5, 6 + 12

        positions = self._num_cells * self.length

        return (
            per_state * self._num_chunks * self.dim**2
            + per_position * positions * self.dim
        ) * element_bytes

    def _count_slstm_flop(self) -> int:
        # y R; backwards, R with the gates' gradients, and these with y.
        num_products = 3 if self.phase == "train" else 1

        return num_products * 2 * self._num_cells * self.length * 4 * self.dim**2

    def _count_slstm_bytes(self, element_bytes: int) -> int:
        positions = self._num_cells * self.length * self.dim
        weights = self.num_experts * self.num_heads * 4 * self.dim**2 * element_bytes

        # Four gates are read and an output is written.
        count = positions * (4 * element_bytes + _FLOAT32_BYTES) + weights
        if self.phase == "train":
            # Saved: 5. Backwards, these, the output and its gradient are read and 4
            # gradients written; R's gradient reads those and the output.
            count += positions * (5 + 7 + 4 + 5) * _FLOAT32_BYTES + 2 * weights

        return count

    def _count_grouped_flop(self) -> int:
        num_products = 3 if self.phase == "train" else 1
        num_rows = self.num_experts * self.num_rows

        return num_products * 2 * num_rows * self.dim * self.out_dim

    def _count_grouped_bytes(self, element_bytes: int) -> int:
        # Each product has these three, two of them to read and one to write.
        num_products = 3 if self.phase == "train" else 1
        num_rows = self.num_experts * self.num_rows
        num_elements = (
            num_rows * (self.dim + self.out_dim)
            + self.num_experts * self.dim * self.out_dim
        )

        return num_products * num_elements * element_bytes


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
    rows = ("moxe", 4, batch * length // 4, 1, 1)

    shapes: list[tuple[Kernel, tuple[str, int, int, int, int], int, int]] = [
        ("mlstm", moxe, 320, 320),
        ("mlstm", xlstm, 256, 256),
        ("slstm", moxe, 160, 160),
        ("slstm", xlstm, 128, 128),
        # The mLSTM expert's up-projection, and the other way
        ("grouped", rows, 640, 2560),
        ("grouped", rows, 1280, 640),
    ]
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
            out_dim=out_dim,
        )
        for kernel, (
            system,
            num_experts,
            num_rows,
            seq_len,
            num_heads,
        ), dim, out_dim in shapes
        for phase in phases
    ]
