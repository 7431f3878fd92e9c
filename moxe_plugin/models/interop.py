"""Parameters of the authors' JAX code (github thiomajid/moxe) under our names.

Each of our parameters is made from one or more of theirs. Their names are paths joined
by ``/``; their linear kernels are stored ``(in, out)``, their head-wise ones
``(heads, out, in)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class AuthorsParameter:
    """Says how one of our parameters is made from theirs."""

    names: tuple[str, ...]
    """Their names."""

    join: Callable[[list[Tensor]], Tensor]
    """Makes ours from theirs."""

    split: Callable[[Tensor], list[Tensor]]
    """Makes theirs from ours."""


def same(name: str) -> AuthorsParameter:
    """Take a parameter as it is.

    :param name: Their name.

    :returns: The correspondence.
    """
    return AuthorsParameter((name,), lambda theirs: theirs[0], lambda ours: [ours])


def transposed(name: str) -> AuthorsParameter:
    """Swap the last two dimensions of a parameter.

    :param name: Their name.

    :returns: The correspondence.
    """
    return AuthorsParameter(
        (name,), lambda theirs: theirs[0].mT, lambda ours: [ours.mT]
    )


def squeezed(name: str, dim: int) -> AuthorsParameter:
    """Drop a dimension of size 1.

    :param name: Their name.
    :param dim: The dimension.

    :returns: The correspondence.
    """
    return AuthorsParameter(
        (name,),
        lambda theirs: theirs[0].squeeze(dim),
        lambda ours: [ours.unsqueeze(dim)],
    )


def stacked_experts(parameters: list[AuthorsParameter]) -> AuthorsParameter:
    """Stack the same parameter of several experts.

    :param parameters: The correspondence for each expert.

    :returns: The correspondence for the stack.
    """
    width = len(parameters[0].names)

    def join(theirs: list[Tensor]) -> Tensor:
        return torch.stack(
            [
                parameter.join(theirs[i * width : (i + 1) * width])
                for i, parameter in enumerate(parameters)
            ]
        )

    def split(ours: Tensor) -> list[Tensor]:
        return [
            tensor
            for parameter, expert in zip(parameters, ours, strict=True)
            for tensor in parameter.split(expert)
        ]

    names = tuple(name for parameter in parameters for name in parameter.names)

    return AuthorsParameter(names, join, split)


def mlstm_block_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of an mLSTM block.

    :param prefix: Their name of the block.

    :returns: Correspondences by our name within the block.
    """
    layer = f"{prefix}/xlstm"
    cell = f"{layer}/mlstm_cell"

    return {
        "norm.weight": same(f"{prefix}/xlstm_norm/scale"),
        "up_proj": same(f"{layer}/proj_up/kernel"),
        "conv.weight": squeezed(f"{layer}/conv1d/conv/kernel", 1),
        "conv.bias": same(f"{layer}/conv1d/conv/bias"),
        "q_proj": transposed(f"{layer}/q_proj/kernel"),
        "k_proj": transposed(f"{layer}/k_proj/kernel"),
        "v_proj": transposed(f"{layer}/v_proj/kernel"),
        "input_gate_weight": same(f"{cell}/igate/kernel"),
        "input_gate_bias": same(f"{cell}/igate/bias"),
        "forget_gate_weight": same(f"{cell}/fgate/kernel"),
        "forget_gate_bias": same(f"{cell}/fgate/bias"),
        "out_norm.weight": same(f"{cell}/outnorm/scale"),
        "skip": same(f"{layer}/learnable_skip"),
        "down_proj": same(f"{layer}/proj_down/kernel"),
    }


def slstm_block_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of an sLSTM block.

    :param prefix: Their name of the block.

    :returns: Correspondences by our name within the block.
    """
    layer = f"{prefix}/xlstm"

    gates = AuthorsParameter(
        tuple(f"{layer}/{gate}gate/kernel" for gate in "ifzo"),
        # (H,out,in) each -> (H,in,gate,out)
        lambda theirs: torch.stack([kernel.mT for kernel in theirs], dim=2),
        lambda ours: [kernel.mT for kernel in ours.unbind(2)],
    )

    return {
        "norm.weight": same(f"{prefix}/xlstm_norm/scale"),
        "conv.weight": squeezed(f"{layer}/conv1d/conv/kernel", 1),
        "conv.bias": same(f"{layer}/conv1d/conv/bias"),
        "gate_proj": gates,
        "recurrent_weight": same(f"{layer}/slstm_cell/_recurrent_kernel_"),
        "gate_bias": same(f"{layer}/slstm_cell/_bias_"),
        "out_norm.weight": same(f"{layer}/group_norm/scale"),
        "ffn_norm.weight": same(f"{prefix}/ffn_norm/scale"),
        "ffn.up_proj": same(f"{prefix}/ffn/proj_up/kernel"),
        "ffn.down_proj": same(f"{prefix}/ffn/proj_down/kernel"),
    }


def ffn_expert_parameters(prefix: str) -> dict[str, AuthorsParameter]:
    """List the parameters of a feed-forward expert.

    :param prefix: Their name of the expert.

    :returns: Correspondences by our name within the expert.
    """
    return {
        "up_proj": AuthorsParameter(
            (f"{prefix}/w1/kernel", f"{prefix}/w3/kernel"),
            lambda theirs: torch.cat(theirs, dim=-1),
            lambda ours: list(ours.chunk(2, dim=-1)),
        ),
        "down_proj": same(f"{prefix}/w2/kernel"),
    }


def from_authors(
    theirs: Mapping[str, Tensor], parameters: Mapping[str, AuthorsParameter]
) -> dict[str, Tensor]:
    """Convert a state dict of theirs to ours.

    :param theirs: Their parameters by name.
    :param parameters: The correspondence for each of our parameters.

    :returns: Our parameters by name.

    :raises ValueError: A name of theirs is missing, or one is unknown.
    """
    expected = {name for parameter in parameters.values() for name in parameter.names}

    _check_names(theirs, expected, "the authors'")

    return {
        name: parameter.join([theirs[n] for n in parameter.names]).contiguous()
        for name, parameter in parameters.items()
    }


def to_authors(
    ours: Mapping[str, Tensor], parameters: Mapping[str, AuthorsParameter]
) -> dict[str, Tensor]:
    """Convert a state dict of ours to theirs.

    :param ours: Our parameters by name.
    :param parameters: The correspondence for each of our parameters.

    :returns: Their parameters by name.

    :raises ValueError: A name of ours is missing, or one is unknown.
    """
    _check_names(ours, parameters, "our")

    return {
        name: tensor.contiguous()
        for key, parameter in parameters.items()
        for name, tensor in zip(
            parameter.names, parameter.split(ours[key]), strict=True
        )
    }


def _check_names(found: Iterable[str], expected: Iterable[str], whose: str) -> None:
    found, expected = set(found), set(expected)

    if missing := sorted(expected - found):
        raise ValueError(
            f"`state_dict` must have every parameter of {whose} model, but "
            f"'{missing[0]}' is missing ({len(missing)} in all)."
        )

    if unknown := sorted(found - expected):
        raise ValueError(
            f"`state_dict` must have the parameters of {whose} model only, but "
            f"'{unknown[0]}' is none of them ({len(unknown)} in all)."
        )
