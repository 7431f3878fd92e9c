"""The sLSTM block of xLSTM (arXiv 2405.04517, figure 10), one or a stack of E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init
from typing_extensions import override

from moxe_plugin.nn.backend import (
    ScanBackend,
    product_dtype,
    resolve_backend,
    trains_on_rows,
)
from moxe_plugin.nn.grouped import grouped_head_products
from moxe_plugin.nn.layers import (
    NORM_EPS,
    CausalConv,
    GatedFeedForward,
    ScaleNorm,
    down_init_std,
    round_up_to_64,
    small_init_std,
)
from moxe_plugin.nn.padding import EMPTY, widen
from moxe_plugin.nn.ragged import RaggedRows, full_rows
from moxe_plugin.nn.rows import find_rows, last_rows, pack, unpack
from moxe_plugin.nn.slstm_cell import SLSTMMemory
from moxe_plugin.nn.slstm_recurrence import GateRows, SLSTMCell
from moxe_plugin.nn.stacked import equal_counts, expert_parameter
from moxe_plugin.nn.stepping_block import SteppingBlock

if TYPE_CHECKING:
    from moxe_plugin.nn.triton.slstm_block import SLSTMWeights
    from moxe_plugin.nn.triton.step_units import StepUnits


class SLSTMState(NamedTuple):
    """What an sLSTM block remembers of a sequence."""

    conv: Tensor
    """The last inputs of the causal convolution. *Shape:* ``([E,]N,K-1,M)``."""

    c: Tensor
    """See :class:`SLSTMMemory`; float32 or float64. *Shape:* ``([E,]N,H,D)``."""

    log_n: Tensor
    """See :class:`SLSTMMemory`. *Shape:* ``([E,]N,H,D)``."""

    y: Tensor
    """See :class:`SLSTMMemory`. *Shape:* ``([E,]N,H,D)``."""


class SLSTMBlock(SteppingBlock[SLSTMState]):
    """Pre-norm, sLSTM cell, residual; pre-norm, gated feed-forward, residual.

    ::

        x' = norm(x);  u = silu(conv(x'))
        i, f, z, o = head_wise(u), head_wise(u), head_wise(x'), head_wise(x')
        x = x + norm_per_head(cell(i, f, z, o))
        y = x + ffn(ffn_norm(x))

    The authors' code leaves the gate projections and biases at 0 by a bug; we use the
    values it intends: gate projections ``N(0, 2/(5D))``, recurrent matrix 0, biases 0
    but for the forget gate's, ``5 - 12 (j/(D-1))^(0.3 + 1.3 r)`` for channel j of a
    head, r from 0 at the first to 1 at the last block.

    :param model_dim: The width M of input and output.
    :param num_heads: The number of heads H of the cell.
    :param conv_kernel_size: The number of taps K of the convolution.
    :param ffn_proj_factor: The hidden width of the feed-forward network over M, before
        rounding up to 64.
    :param num_experts: The number of stacked blocks; ``None`` for a single one.
    :param block_idx: Where the block stands among ``num_blocks``, for the forget bias.
    :param num_blocks: The number of blocks in the model.
    :param backend: What computes the loop over time and the convolution: see
        :mod:`moxe_plugin.nn.backend`.

    :raises ValueError: ``model_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        conv_kernel_size: int = 4,
        ffn_proj_factor: float = 1.7,
        num_experts: int | None = None,
        block_idx: int = 0,
        num_blocks: int = 1,
        backend: ScanBackend = "auto",
    ) -> None:
        super().__init__()

        if model_dim % num_heads:
            raise ValueError(
                f"`num_heads` must divide `model_dim` ({model_dim}), but is "
                f"{num_heads} instead."
            )

        head_dim = model_dim // num_heads

        self.model_dim = model_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.block_idx = block_idx
        self.num_blocks = num_blocks
        self.backend = backend

        self.norm = ScaleNorm(model_dim, num_experts=num_experts)
        self.conv = CausalConv(
            model_dim, kernel_size=conv_kernel_size, num_experts=num_experts
        )
        # ([E,]H,in,gate,out), gates i, f, z, o
        self.gate_proj = expert_parameter(num_experts, num_heads, head_dim, 4, head_dim)
        self.recurrent_weight = expert_parameter(
            num_experts, num_heads, head_dim, 4, head_dim
        )
        self.gate_bias = expert_parameter(num_experts, num_heads, 4, head_dim)
        self.out_norm = ScaleNorm(
            model_dim, num_heads=num_heads, num_experts=num_experts
        )
        self.ffn_norm = ScaleNorm(model_dim, num_experts=num_experts)
        self.ffn = GatedFeedForward(
            model_dim,
            round_up_to_64(ffn_proj_factor * model_dim),
            up_std=small_init_std(model_dim),
            down_std=down_init_std(model_dim, num_blocks),
            num_experts=num_experts,
        )

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the block's own parameters; norms, conv and FFN do theirs."""
        init.normal_(self.gate_proj, std=small_init_std(self.head_dim))
        init.zeros_(self.recurrent_weight)
        init.zeros_(self.gate_bias)

        depth = self.block_idx / (self.num_blocks - 1) if self.num_blocks > 1 else 0.0
        channel = torch.linspace(0.0, 1.0, self.head_dim, device=self.gate_bias.device)
        with torch.no_grad():
            self.gate_bias[..., 1, :] = 5 - 12 * channel ** (0.3 + 1.3 * depth)

    @override
    def initial_state(
        self, batch_size: int, device: torch.device | None = None
    ) -> SLSTMState:
        weight = self.gate_proj
        rows = (*weight.shape[:-4], batch_size)
        heads = (*rows, self.num_heads, self.head_dim)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(
                shape, device=device or weight.device, dtype=widen(weight[:0]).dtype
            )

        return SLSTMState(
            zeros(*rows, self.conv.kernel_size - 1, self.model_dim),
            zeros(*heads),
            zeros(*heads) + EMPTY,
            zeros(*heads),
        )

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None = None,
        state: SLSTMState | None = None,
        *,
        return_state: bool = True,
        reuse_state: bool = False,
    ) -> tuple[Tensor, SLSTMState | None]:
        """Apply the block to sequences.

        :param seqs: *Shape:* ``([E,]N,S,M)``.
        :param seq_lens: Where right padding begins, from 0; ``None`` without padding.
            Outputs at padding are finite and meaningless. *Shape:* ``([E,]N)``.
        :param state: The state before the first position; ``None`` if empty.
        :param return_state: Whether to return a state.
        :param reuse_state: Whether the tensors of ``state`` may become those of the
            state that is returned.

        :returns: The outputs, as ``seqs``, and the state after each row's last valid
            position (``state`` itself for a row of length 0), or ``None``.
        """
        keeps_state = state is not None or return_state

        if self._is_step(seqs, seq_lens) and keeps_state:
            return self._step(seqs, state, reuse=reuse_state)

        if self.num_experts is None and not keeps_state and self.trains_on_rows(seqs):
            flat = self.apply_to_rows(
                seqs.flatten(0, 1), full_rows(*seqs.shape[:2], seqs.device)
            )

            return flat.view_as(seqs), None

        if state is None:
            state = self.initial_state(seqs.size(-3), seqs.device)

        cell = SLSTMCell(
            self.gate_bias, self.recurrent_weight, resolve_backend(self.backend, seqs)
        )
        memory = SLSTMMemory(*state[1:])

        if self.num_experts is not None and seq_lens is not None:
            rows = find_rows(seq_lens, seqs.size(-2))
            flat = pack(seqs, rows)

            normed = self.norm(flat, rows.counts)
            convolved = self.conv.convolve_rows(normed, rows, state.conv, self.backend)
            gates = self._project_gates(F.silu(convolved), normed, rows.counts)

            hidden, memory = cell.apply(
                GateRows(gates, seqs.shape[:-1], seq_lens, rows), memory
            )

            flat = self._feed_forward(flat, hidden, rows.counts)
            seqs = unpack(flat, rows)
            window = last_rows(normed, rows, state.conv) if return_state else None
        else:
            normed = self.norm(seqs)
            convolved, window = self.conv(normed, state.conv, seq_lens, self.backend)
            gates = self._project_gates(F.silu(convolved), normed, None)

            hidden, memory = cell.apply(
                GateRows(gates, seqs.shape[:-1], seq_lens, None), memory
            )

            seqs = self._feed_forward(seqs, hidden.view(seqs.shape), None)

        if not return_state:
            return seqs, None

        assert window is not None

        return seqs, SLSTMState(window, *memory)

    def trains_on_rows(self, seqs: Tensor) -> bool:
        """Tell whether :meth:`apply_to_rows` can be asked for.

        :param seqs: What the block, or what sends it rows, reads. *Shape:* ``(N,S,M)``.

        :returns: See :func:`~moxe_plugin.nn.backend.trains_on_rows`.
        """
        if not trains_on_rows(self.backend, seqs):
            return False

        from moxe_plugin.nn.triton.slstm_block import supports

        return supports(self.head_dim, product_dtype(seqs), self.conv.kernel_size)

    def apply_to_rows(self, flat: Tensor, rows: RaggedRows) -> Tensor:
        """Apply the block to segments, each from an empty memory, in Triton kernels.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: Where rows stand.

        :returns: The outputs, as ``flat``.
        """
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.slstm_block import slstm_block_rows

        weights = self._triton_weights()

        return slstm_block_rows(flat, weights, rows, NORM_EPS, product_dtype(flat))

    @override
    def step_units(self, units: StepUnits, state: SLSTMState, out: Tensor) -> None:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.block_steps import step_slstm_block

        weights = self._triton_weights()

        step_slstm_block(units, weights, state, out, NORM_EPS)

    def _triton_weights(self) -> SLSTMWeights:
        from moxe_plugin.nn.triton.slstm_block import SLSTMWeights

        return SLSTMWeights(
            *(self.norm.weight, self.conv.weight, self.conv.bias),
            *(self.gate_proj, self.recurrent_weight, self.gate_bias),
            *(self.out_norm.weight, self.ffn_norm.weight),
            *(self.ffn.up_proj, self.ffn.down_proj),
        )

    def _feed_forward(
        self, seqs: Tensor, hidden: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        seqs = seqs + self.out_norm(hidden.to(seqs.dtype), counts)

        output: Tensor = seqs + self.ffn(self.ffn_norm(seqs, counts), counts)

        return output

    def _project_gates(
        self, convolved: Tensor, normed: Tensor, counts: Sequence[int] | None
    ) -> list[Tensor]:
        # i and f see the convolution, z and o do not: (…,M) -> (…,H*2*D) -> (C,H*2*D)
        # ([E,]H,D,4,D) -> (E,H,D,2,2*D)
        pairs = 2, 2 * self.head_dim
        weight = self.gate_proj.view(-1, *self.gate_proj.shape[-4:-2], *pairs)
        rows = [x.flatten(0, -2) for x in (convolved, normed)]

        if counts is None:
            counts = equal_counts(rows[0], weight)

        return grouped_head_products(rows, weight, counts)
