"""The sLSTM block of xLSTM (arXiv 2405.04517, figure 10), one or a stack of E."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, init

from moxe_plugin.nn.backend import ScanBackend, resolve_backend
from moxe_plugin.nn.layers import (
    CausalConv,
    GatedFeedForward,
    ScaleNorm,
    down_init_std,
    round_up_to_64,
    small_init_std,
)
from moxe_plugin.nn.native.slstm_scan import SLSTMScanInputs, slstm_scan
from moxe_plugin.nn.padding import EMPTY, close_gates, valid_positions, widen
from moxe_plugin.nn.rows import find_rows, pack, unpack
from moxe_plugin.nn.slstm_cell import SLSTMMemory, slstm_sequence
from moxe_plugin.nn.stacked import expert_parameter


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


class SLSTMBlock(Module):
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
    :param backend: What computes the loop over time: see
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

    def initial_state(
        self, batch_size: int, device: torch.device | None = None
    ) -> SLSTMState:
        """Create the state before the first position.

        :param batch_size: The number of rows N.
        :param device: Where the state lives; the block's device by default.

        :returns: An empty memory.
        """
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
    ) -> tuple[Tensor, SLSTMState | None]:
        """Apply the block to sequences.

        :param seqs: *Shape:* ``([E,]N,S,M)``.
        :param seq_lens: Where right padding begins, from 0; ``None`` without padding.
            Outputs at padding are finite and meaningless. *Shape:* ``([E,]N)``.
        :param state: The state before the first position; ``None`` if empty.
        :param return_state: Whether to return a state.

        :returns: The outputs, as ``seqs``, and the state after each row's last valid
            position (``state`` itself for a row of length 0), or ``None``.
        """
        if state is None:
            state = self.initial_state(seqs.size(-3), seqs.device)

        normed = self.norm(seqs)
        convolved, window = self.conv(normed, state.conv, seq_lens)

        scan = self._scan_steps
        if (backend := resolve_backend(self.backend, seqs)) != "torch":
            scan = partial(self._scan_fused, backend == "triton")

        hidden, memory = scan(F.silu(convolved), normed, seq_lens, state)

        hidden = hidden.to(seqs.dtype)

        if self.num_experts is None or seq_lens is None:
            seqs = self._feed_forward(seqs, hidden, None)
        else:
            rows = find_rows(seq_lens, seqs.size(-2))
            flat = self._feed_forward(pack(seqs, rows), pack(hidden, rows), rows.counts)
            seqs = unpack(flat, rows)

        return seqs, SLSTMState(window, *memory) if return_state else None

    def _feed_forward(
        self, seqs: Tensor, hidden: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        seqs = seqs + self.out_norm(hidden, counts)

        output: Tensor = seqs + self.ffn(self.ffn_norm(seqs, counts), counts)

        return output

    def _scan_fused(
        self,
        on_gpu: bool,
        convolved: Tensor,
        normed: Tensor,
        seq_lens: Tensor | None,
        state: SLSTMState,
    ) -> tuple[Tensor, SLSTMMemory]:
        bias = widen(self.gate_bias)
        # (E,H,N*S,gate*out) -> (E,H,N,S,gate*out)
        gates = [
            torch.unflatten(self._project_heads(x, weight), -2, x.shape[-3:-1]).to(
                bias.dtype
            )
            for x, weight in zip(
                (convolved, normed), self.gate_proj.chunk(2, -2), strict=True
            )
        ]
        inputs = [*gates, bias, self.recurrent_weight.to(bias.dtype), *state[1:]]

        if self.num_experts is None:
            inputs = [x.unsqueeze(0) for x in inputs]
            seq_lens = None if seq_lens is None else seq_lens.unsqueeze(0)

        if on_gpu:
            # Imports Triton, which not every machine has.
            from moxe_plugin.nn.triton.slstm_scan import slstm_scan as scan
        else:
            scan = slstm_scan

        outputs, *memory = scan(SLSTMScanInputs(*inputs), seq_lens)

        if self.num_experts is None:
            outputs, *memory = (x.squeeze(0) for x in (outputs, *memory))

        return outputs.flatten(-2), SLSTMMemory(*memory)

    def _scan_steps(
        self,
        convolved: Tensor,
        normed: Tensor,
        seq_lens: Tensor | None,
        state: SLSTMState,
    ) -> tuple[Tensor, SLSTMMemory]:
        gates = self._gate_inputs(convolved, normed, seq_lens)
        memory = SLSTMMemory(*(_batch_last(x) for x in state[1:]))
        weight = self.recurrent_weight.flatten(0, -4).to(gates.dtype)
        # time first, batch last: (S,E*H,D,N)
        outputs, c, log_n = slstm_sequence(gates, weight, memory)

        hidden = self._batch_first(outputs).movedim(0, -3).flatten(-2)

        y = self._batch_first(outputs[-1])
        if seq_lens is not None:
            y = self._last_output(hidden, state.y, seq_lens)

        return hidden, SLSTMMemory(self._batch_first(c), self._batch_first(log_n), y)

    def _gate_inputs(
        self, convolved: Tensor, normed: Tensor, seq_lens: Tensor | None
    ) -> Tensor:
        # i and f see the convolution, z and o do not.
        halves = [
            self._project_gates(x, weight)
            for x, weight in zip(
                (convolved, normed), self.gate_proj.chunk(2, -2), strict=True
            )
        ]
        # (S,[E,]H,4,D,N)
        gates = widen(torch.cat(halves, dim=-3))
        gates = gates + widen(self.gate_bias).unsqueeze(-1)

        if seq_lens is not None:
            i, f, z, o = gates.unbind(-3)
            # ([E,]N,S) -> (S,[E,]1,1,N)
            valid = valid_positions(seq_lens, gates.size(0)).movedim(-1, 0)
            i, f = close_gates(i, f, valid.unsqueeze(-2).unsqueeze(-2))
            gates = torch.stack([i, f, z, o], dim=-3)

        return gates.flatten(1, -4)

    def _project_gates(self, seqs: Tensor, weight: Tensor) -> Tensor:
        product = self._project_heads(seqs, weight)

        # ([E,]H,N*S,gate*out) -> (S,[E,]H,gate,out,N)
        product = torch.unflatten(product, -2, seqs.shape[-3:-1])
        product = torch.unflatten(product, -1, (-1, self.head_dim))

        return product.movedim(-3, 0).movedim(-3, -1)

    def _project_heads(self, seqs: Tensor, weight: Tensor) -> Tensor:
        # ([E,]N,S,M) -> ([E,]H,N*S,in) -> ([E,]H,N*S,gate*out)
        heads = torch.unflatten(seqs, -1, (self.num_heads, -1)).flatten(-4, -3)

        return heads.transpose(-3, -2) @ weight.flatten(-2)

    def _batch_first(self, x: Tensor) -> Tensor:
        # (…,E*H,D,N) -> (…,[E,]N,H,D)
        heads = self.gate_proj.shape[:-3]

        return torch.unflatten(x, -3, heads).movedim(-1, -3)

    def _last_output(self, hidden: Tensor, y: Tensor, seq_lens: Tensor) -> Tensor:
        # Position t of `hidden` is position t+1 here.
        outputs = torch.cat([y.flatten(-2).unsqueeze(-2), hidden], dim=-2)
        index = seq_lens[..., None, None].expand(*seq_lens.shape, 1, hidden.size(-1))

        last = outputs.gather(-2, index).squeeze(-2)

        return torch.unflatten(last, -1, y.shape[-2:])


def _batch_last(x: Tensor) -> Tensor:
    # ([E,]N,H,D) -> (E*H,D,N)
    return x.movedim(-3, -1).flatten(0, -3)
