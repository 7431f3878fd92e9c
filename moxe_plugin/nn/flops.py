"""Count the floating-point operations of forward passes, analytically.

A multiply-add is 2 FLOPs, and only matrix products count: norms, activations, softmax,
gates and depthwise convolutions do not. As torch's ``FlopCounterMode`` and model FLOPs
utilisation (PaLM, arXiv 2204.02311, appendix B) have it, a causal product of queries
and keys counts whole, although what lies above the diagonal is then masked.

What is known to be useless does not count: padding, and products with a memory that is
still empty.
"""

from __future__ import annotations

from moxe_plugin.nn.layers import round_up_to_64
from moxe_plugin.nn.mlstm_cell import best_chunk_size


def linear_flops(input_dim: int, output_dim: int) -> int:
    """Count a projection of one position.

    :param input_dim: The number of inputs.
    :param output_dim: The number of outputs.

    :returns: FLOPs per position.
    """
    return 2 * input_dim * output_dim


def gated_ffn_flops(model_dim: int, hidden_dim: int) -> int:
    """Count a gated feed-forward network: two projections up, one down.

    :param model_dim: The width of input and output.
    :param hidden_dim: The width in between.

    :returns: FLOPs per position.
    """
    return 3 * linear_flops(model_dim, hidden_dim)


def attention_flops(num_keys: int, num_heads: int, head_dim: int) -> int:
    """Count softmax attention without its projections: scores, and the sum of values.

    :param num_keys: How many keys each query is multiplied with, masked ones included.
    :param num_heads: The number of query heads.
    :param head_dim: The width of a head.

    :returns: FLOPs per position.
    """
    return 4 * num_keys * num_heads * head_dim


def mlstm_cell_flops(seq_len: int, num_heads: int, head_dim: int) -> float:
    """Count the mLSTM cell in the form that :func:`best_chunk_size` chooses.

    Within a chunk of length L a position costs ``4 L D`` per head, as attention; every
    chunk but the first reads the matrix memory and its normaliser (``2 D² + 2 D``), and
    every chunk but the last writes the memory (``2 D²``).

    :param seq_len: The length of the sequence, whose last memory nobody wants.
    :param num_heads: The number of heads H.
    :param head_dim: The width D of a head.

    :returns: FLOPs per position, the mean over the sequence.
    """
    chunk_size = best_chunk_size(seq_len, head_dim)
    num_whole, rest = divmod(seq_len, chunk_size)
    chunk_lens = [chunk_size] * num_whole + [rest] * (rest > 0)

    within = sum(attention_flops(n, num_heads, head_dim) * n for n in chunk_lens)
    read = sum(chunk_lens[1:]) * num_heads * linear_flops(head_dim, head_dim + 1)
    written = sum(chunk_lens[:-1]) * num_heads * linear_flops(head_dim, head_dim)

    return (within + read + written) / seq_len


def mlstm_block_flops(
    model_dim: int,
    *,
    num_heads: int,
    qkv_block_size: int,
    proj_factor: float,
    seq_len: int,
) -> float:
    """Count a block of :class:`~moxe_plugin.nn.mlstm.MLSTMBlock`.

    :param model_dim: The width M of input and output.
    :param num_heads: The number of heads.
    :param qkv_block_size: The block size of the q, k and v projections.
    :param proj_factor: The inner width over M, before rounding up to 64.
    :param seq_len: The length of the sequence that the block sees.

    :returns: FLOPs per position, the mean over the sequence.
    """
    inner_dim = round_up_to_64(proj_factor * model_dim)

    return (
        linear_flops(model_dim, 2 * inner_dim)
        # q, k, v
        + 3 * linear_flops(inner_dim, qkv_block_size)
        # input and forget gate, from q, k and v
        + linear_flops(3 * inner_dim, 2 * num_heads)
        + mlstm_cell_flops(seq_len, num_heads, inner_dim // num_heads)
        + linear_flops(inner_dim, model_dim)
    )


def slstm_block_flops(
    model_dim: int, *, num_heads: int, ffn_proj_factor: float, seq_len: int
) -> float:
    """Count a block of :class:`~moxe_plugin.nn.slstm.SLSTMBlock`.

    The recurrent matrix counts from the second position on: the first one has no
    output before it.

    :param model_dim: The width M of input and output.
    :param num_heads: The number of heads.
    :param ffn_proj_factor: The hidden width of the feed-forward network over M, before
        rounding up to 64.
    :param seq_len: The length of the sequence that the block sees.

    :returns: FLOPs per position, the mean over the sequence.
    """
    # Four gates, head by head.
    gates = linear_flops(model_dim, 4 * (model_dim // num_heads))

    return (
        gates
        + gates * (seq_len - 1) / seq_len
        + gated_ffn_flops(model_dim, round_up_to_64(ffn_proj_factor * model_dim))
    )
