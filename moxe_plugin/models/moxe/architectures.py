"""The named architectures of MoxE: four sizes, and the paper's ablations of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.moxe.config import MoxEConfig


def register_moxe_configs(container: DependencyContainer) -> None:
    """Register the named architectures with fairseq2.

    A size alone is full MoxE; ``SIZE_ABLATION`` is one of the paper's Table 2, and
    ``SIZE_SELECTION`` chooses experts by another rule;
    ``SIZE_STATE`` and ``SIZE_ABLATION_STATE`` change what experts remember.
    ``authors_SIZE`` and ``authors_SIZE_ABLATION`` do all as the authors' code.

    :param container: fairseq2's dependency container.
    """
    arch = ConfigRegistrar(container, MoxEConfig)

    for size, create_size in SIZES.items():
        systems = {size: create_size}

        for ablation, ablate in ABLATIONS.items():
            systems[f"{size}_{ablation}"] = _compose(create_size, ablate)

        for selection, select in SELECTIONS.items():
            arch(f"{size}_{selection}")(_compose(create_size, select))

        for system, create in systems.items():
            arch(system)(create)
            arch(f"authors_{system}")(_compose(create, do_as_authors))

            for state, set_state in EXPERT_STATES.items():
                arch(f"{system}_{state}")(_compose(create, set_state))


def _compose(
    create_size: Callable[[], MoxEConfig], ablate: Callable[[MoxEConfig], MoxEConfig]
) -> Callable[[], MoxEConfig]:
    return lambda: ablate(create_size())


def _340m() -> MoxEConfig:
    # Feed-forward experts of the authors' width, 2.0, make their ablation 7 % smaller.
    return MoxEConfig(expert_ffn_proj_factor=2.2)


def _small() -> MoxEConfig:
    return MoxEConfig(
        vocab_size=4096,
        pad_idx=1,
        model_dim=96,
        num_layers=3,
        expert_ffn_proj_factor=2.75,
    )


def _quickstart() -> MoxEConfig:
    return MoxEConfig(
        vocab_size=2048,
        pad_idx=1,
        model_dim=96,
        num_layers=2,
        num_heads=4,
        expert_ffn_proj_factor=8 / 3,
    )


def _tiny() -> MoxEConfig:
    return MoxEConfig(
        vocab_size=320,
        max_seq_len=64,
        model_dim=32,
        num_layers=2,
        num_heads=2,
        num_experts=4,
    )


SIZES = {"340m": _340m, "small": _small, "quickstart": _quickstart, "tiny": _tiny}
"""Full MoxE by size; ``340m`` is the paper's Table 1."""


def _gamma0(config: MoxEConfig) -> MoxEConfig:
    return replace(config, difficulty_bias_scale=0.0)


def _standard(config: MoxEConfig) -> MoxEConfig:
    return replace(config, router="standard")


def _no_group_loss(config: MoxEConfig) -> MoxEConfig:
    return replace(config, group_loss_scale=0.0)


def _ffn(config: MoxEConfig) -> MoxEConfig:
    return replace(config, router="standard", experts="ffn")


def _mlstm(config: MoxEConfig) -> MoxEConfig:
    return replace(
        config,
        router="standard",
        mixer_blocks=["mlstm", "mlstm"],
        num_mlstm_experts=config.num_experts,
    )


def _slstm(config: MoxEConfig) -> MoxEConfig:
    return replace(
        config,
        router="standard",
        mixer_blocks=["slstm", "slstm"],
        num_mlstm_experts=0,
    )


ABLATIONS = {
    "gamma0": _gamma0,
    "standard": _standard,
    "no_group_loss": _no_group_loss,
    "ffn": _ffn,
    "mlstm": _mlstm,
    "slstm": _slstm,
}
"""The rows of the paper's Table 2. Its "no entropy bias" is ``gamma0`` by the paper's
text, and by the authors' code ``standard`` (MoxE-Standard), which has neither the
difficulty nor its two losses. ``ffn`` is xLSTM-MoE; ``mlstm`` and ``slstm`` are
mLSTM-MoE and sLSTM-MoE, whose mixers have blocks of the same kind."""


def _token(config: MoxEConfig) -> MoxEConfig:
    return replace(config, expert_state="token")


def _dense(config: MoxEConfig) -> MoxEConfig:
    return replace(config, expert_state="dense")


EXPERT_STATES = {"token": _token, "dense": _dense}
"""What experts remember, if not the tokens routed to them (``subsequence``). The
feed-forward experts of ``ffn`` remember nothing in any case."""


def do_as_authors(config: MoxEConfig) -> MoxEConfig:
    """Change a configuration to what the authors' code computes, where ours differs.

    Not by a field: padding, which they do not mask, and the initial values of q, k, v
    and the sLSTM's gates, which are 0 in their code and then stay there in part.

    :param config: A configuration of ours.

    :returns: The changed copy.
    """
    return replace(
        config,
        expert_state="token",
        load_balance_loss="squared",
        final_norm=False,
        expert_ffn_proj_factor=2.0,
    )


def _dynamic(config: MoxEConfig) -> MoxEConfig:
    return replace(config, expert_selection="dynamic")


def _global_workspace(config: MoxEConfig) -> MoxEConfig:
    return replace(config, expert_selection="global_workspace")


def _loss_free(config: MoxEConfig) -> MoxEConfig:
    return replace(config, expert_selection="loss_free", load_balance_loss_scale=0.0)


SELECTIONS = {
    "dynamic": _dynamic,
    "global_workspace": _global_workspace,
    "loss_free": _loss_free,
}
"""Full MoxE with other rules by which a router chooses experts."""
