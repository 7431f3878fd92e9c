"""What the two xLSTM blocks are built from; see :mod:`moxe_plugin.nn.stacked`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, init

from moxe_plugin.nn.backend import ScanBackend, convolves_natively
from moxe_plugin.nn.grouped import spread
from moxe_plugin.nn.native.causal_conv import causal_conv
from moxe_plugin.nn.native.scale_norm import scale_norm
from moxe_plugin.nn.passes import passes_natively, widen_for_native
from moxe_plugin.nn.rows import Rows, shift_rows
from moxe_plugin.nn.stacked import equal_counts, expert_parameter, per_channel

NORM_EPS = 1e-5


class ScaleNorm(Module):
    """Layer normalisation with a scale and no bias, over the whole width or per head.

    ``(x - mean(x)) / sqrt(var(x) + 1e-5) * weight`` with the biased variance. With
    ``num_heads`` above 1, mean and variance are those of each head's channels: the
    MultiHeadLayerNorm of xLSTM.

    :param dim: The number of channels.
    :param num_heads: The number of equal groups that are normalised separately.
    :param num_experts: The number of stacked norms; ``None`` for a single one.
    """

    def __init__(
        self, dim: int, *, num_heads: int = 1, num_experts: int | None = None
    ) -> None:
        super().__init__()

        self.num_heads = num_heads
        self.weight = expert_parameter(num_experts, dim)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        init.ones_(self.weight)

    def forward(self, seqs: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Normalise each position.

        :param seqs: *Shape:* ``([E,]N,S,M)``, or ``(C,M)``.
        :param counts: The rows of each expert, if ``seqs`` are rows ``(C,M)``.

        :returns: The results, as ``seqs``.
        """
        if passes_natively("scale_norm", seqs, self.weight):
            # One norm is that of one expert: all positions of all experts alike, unless
            # they are rows.
            weight = widen_for_native(self.weight.view(-1, self.weight.size(-1)))
            flat = widen_for_native(seqs.flatten(0, -2))
            if counts is None:
                counts = equal_counts(flat, weight)

            normed = scale_norm(flat, weight, counts, self.num_heads, NORM_EPS)

            return normed.to(seqs.dtype).view(seqs.shape)

        if self.num_heads == self.weight.ndim == 1 and self.weight.dtype == seqs.dtype:
            return F.layer_norm(seqs, seqs.shape[-1:], self.weight, eps=NORM_EPS)

        head_dim = seqs.size(-1) // self.num_heads
        heads = torch.unflatten(seqs, -1, (self.num_heads, head_dim))
        normed = F.layer_norm(heads, (head_dim,), eps=NORM_EPS).flatten(-2)

        return normed * per_channel(self.weight, normed, counts)


class CausalConv(Module):
    """Depthwise causal convolution over time with a bias.

    ``y_t = bias + sum_k weight_k * x_{t-(K-1)+k}``, k = 0..K-1, K = ``kernel_size``.

    :param dim: The number of channels.
    :param kernel_size: The number of taps; the last one is the present.
    :param activates: Whether the results are ``silu(y)`` instead.
    :param num_experts: The number of stacked convolutions; ``None`` for a single one.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        activates: bool = False,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()

        self.kernel_size = kernel_size
        self.activates = activates
        self.weight = expert_parameter(num_experts, kernel_size, dim)
        self.bias = expert_parameter(num_experts, dim)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps from ``N(0, 1/K)`` (LeCun; fan-in K) and set the bias to 0."""
        init.normal_(self.weight, std=self.kernel_size**-0.5)
        init.zeros_(self.bias)

    def forward(
        self,
        seqs: Tensor,
        window: Tensor,
        seq_lens: Tensor | None = None,
        backend: ScanBackend = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Convolve and return the inputs that the next call needs.

        :param seqs: *Shape:* ``([E,]N,S,M)``.
        :param window: The K-1 inputs before ``seqs``. *Shape:* ``([E,]N,K-1,M)``.
        :param seq_lens: The lengths, 0 allowed; ``None`` if all are S. *Shape:*
            ``([E,]N)``.
        :param backend: What computes it: see :mod:`moxe_plugin.nn.backend`.

        :returns: The result, and the last K-1 inputs of each row, which reach back into
            ``window`` where a row is shorter. *Shapes:* as ``seqs`` and ``window``.
        """
        window = window.to(seqs.dtype)
        is_native = self._runs_native(backend, seqs, window)

        # Without lengths, the last inputs are all that C++ leaves to look at.
        num_kept = seqs.size(-2)
        if is_native and seq_lens is None:
            num_kept = min(num_kept, self.kernel_size - 1)

        # Position t of what is kept is position t+K-1 here.
        kept = seqs[..., seqs.size(-2) - num_kept :, :]
        inputs = torch.cat([window, kept], dim=-2)

        out = (
            self._convolve_native(
                seqs.flatten(0, -2),
                window.flatten(0, -3),
                [seqs.size(-2)] * math.prod(seqs.shape[:-2]),
            ).view(seqs.shape)
            if is_native
            else self._convolve(inputs)
        )

        if seq_lens is None:
            return out, inputs[..., num_kept:, :]

        taps = torch.arange(self.kernel_size - 1, device=seqs.device)
        # ([E,]N) -> ([E,]N,K-1,M)
        index = (seq_lens.unsqueeze(-1) + taps).unsqueeze(-1).expand_as(window)

        return out, inputs.gather(-2, index)

    def convolve_rows(
        self,
        flat: Tensor,
        rows: Rows,
        window: Tensor | None,
        backend: ScanBackend = "auto",
    ) -> Tensor:
        """Convolve sequences without padding.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: The rows.
        :param window: As in :meth:`forward`; zeros if ``None``. *Shape:*
            ``(E,N,K-1,M)``.
        :param backend: As in :meth:`forward`.

        :returns: *Shape:* ``(C,M)``.
        """
        if window is not None:
            window = window.to(flat.dtype)

        if self._runs_native(backend, flat, window):
            windows = None if window is None else window.flatten(0, 1)

            return self._convolve_native(flat, windows, rows.seq_lens)

        out = spread(self.bias, rows.counts)

        for num_steps in range(self.kernel_size):
            inputs = flat
            if num_steps > 0:
                inputs = shift_rows(flat, num_steps, rows, window)

            tap = self.weight[:, self.kernel_size - 1 - num_steps]
            out = torch.addcmul(out, inputs, spread(tap, rows.counts))

        return F.silu(out) if self.activates else out

    def _runs_native(
        self, backend: ScanBackend, seqs: Tensor, window: Tensor | None
    ) -> bool:
        tensors = (seqs, self.weight, self.bias, *(() if window is None else (window,)))

        return convolves_natively(backend, *tensors)

    def _convolve_native(
        self, flat: Tensor, windows: Tensor | None, seq_lens: Sequence[int]
    ) -> Tensor:
        # A single convolution is that of one expert: ([E,]K,M) -> (E,K,M)
        weight = widen_for_native(self.weight.view(-1, *self.weight.shape[-2:]))
        bias = widen_for_native(self.bias.view(-1, self.bias.size(-1)))
        windows = None if windows is None else widen_for_native(windows)

        return causal_conv(
            *(widen_for_native(flat), windows, weight, bias, seq_lens),
            activates=self.activates,
        ).to(flat.dtype)

    def _convolve(self, inputs: Tensor) -> Tensor:
        seq_len = inputs.size(-2) - (self.kernel_size - 1)

        out = per_channel(self.bias, inputs)
        for k in range(self.kernel_size):
            tap = per_channel(self.weight[..., k, :], inputs)
            out = torch.addcmul(out, inputs[..., k : k + seq_len, :], tap)

        return F.silu(out) if self.activates else out


def small_init_std(dim: int) -> float:
    """Compute ``sqrt(2/(5*dim))``, the "small init" of projections into a block.

    :param dim: The number of inputs.

    :returns: The standard deviation.
    """
    return math.sqrt(2 / (5 * dim))


def down_init_std(model_dim: int, num_blocks: int) -> float:
    """Compute ``2/(num_blocks*sqrt(M))``, the init of projections out of a block.

    :param model_dim: The model's width M.
    :param num_blocks: The number of residual blocks that add up.

    :returns: The standard deviation.
    """
    return 2 / (num_blocks * math.sqrt(model_dim))


def round_up_to_64(dim: float) -> int:
    """Round a width up to a multiple of 64, as the xLSTM blocks do.

    :param dim: The width, positive.

    :returns: The smallest multiple of 64 that is at least ``dim``.
    """
    return math.ceil(dim / 64) * 64
