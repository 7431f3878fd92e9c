"""The routing page: one HTML file that needs nothing else."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moxe_plugin.eval.traces import LayerTrace
from moxe_plugin.nn.routing import normalized_entropy
from moxe_plugin.routing_page.colours import (
    MLSTM_COLOUR,
    NUM_STEPS,
    SCALE_ENDS,
    SLSTM_COLOUR,
    Step,
    scale_steps,
    step_of,
)
from moxe_plugin.routing_page.pieces import split_runs
from moxe_plugin.routing_page.view import GROUP_NAMES, RoutingView

_NUM_DIGITS: Final = 4
"""How many decimals the page knows and shows."""


def render_page(view: RoutingView, layer_idx: int = 0) -> str:
    """Render the page.

    Its style and script are the only ones that its Content-Security-Policy allows, and
    it may load nothing. Without its script it shows the layer ``layer_idx``.

    :param view: What to show.
    :param layer_idx: The layer that is shown first.

    :returns: HTML.
    """
    environment = Environment(
        loader=PackageLoader("moxe_plugin.routing_page", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}

    folder = files("moxe_plugin.routing_page") / "page"
    style = _palette() + (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")

    data = _page_data(view, layer_idx)
    colouring = view.colourings()[0]
    layer = view.trace.layers[layer_idx]

    return environment.get_template("page.html.jinja").render(
        view=view,
        data=data,
        # Ours, not the text's: these two alone are not escaped.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        layer_idx=layer_idx,
        colouring=colouring,
        tokens=[
            {
                "runs": split_runs(piece.text),
                "mark": mark,
                "step": step_of(value, colouring.low, colouring.high),
            }
            for piece, mark, value in zip(
                view.pieces,
                view.marks(layer),
                colouring.values[layer_idx].tolist(),
                strict=True,
            )
        ],
        summaries=[view.summarize(layer) for layer in view.trace.layers],
        present_marks={
            mark: name
            for mark, name in GROUP_NAMES.items()
            if any(mark in layer["marks"] for layer in data["layers"])
        },
        steps=range(NUM_STEPS),
        mean_nll=float(view.trace.nll_nats.mean()),
    )


def _page_data(view: RoutingView, layer_idx: int) -> dict[str, Any]:
    return {
        "layer": layer_idx,
        "steps": NUM_STEPS,
        "scaleEnds": SCALE_ENDS,
        "ids": view.trace.token_ids.tolist(),
        "owners": [piece.owner for piece in view.pieces],
        "nll": _round(view.trace.nll_nats.tolist()),
        "experts": [view.expert_name(idx) for idx in range(view.num_experts)],
        "numMlstm": view.num_mlstm_experts,
        "scales": {
            c.key: {"label": c.label, "low": c.low, "high": c.high}
            for c in view.colourings()
        },
        "layers": [_layer_data(view, layer) for layer in view.trace.layers],
    }


def _layer_data(view: RoutingView, layer: LayerTrace) -> dict[str, Any]:
    shares = view.mlstm_shares(layer)
    difficulty = layer.difficulty

    return {
        "difficulty": None if difficulty is None else _round(difficulty.tolist()),
        "entropy": _round(normalized_entropy(layer.unbiased_probs).tolist()),
        "probs": _round(layer.router_probs.tolist()),
        "unbiased": _round(layer.unbiased_probs.tolist()),
        "experts": layer.expert_indices.tolist(),
        "weights": _round(layer.expert_weights.tolist()),
        "marks": view.marks(layer),
        "shares": None if shares is None else _round(shares.tolist()),
    }


def _round(values: Any) -> Any:
    if isinstance(values, list):
        return [_round(value) for value in values]

    return round(values, _NUM_DIGITS)


def _palette() -> str:
    steps = scale_steps()

    def rules(in_order: list[Step]) -> str:
        return "".join(
            f"[data-step='{idx}']{{background-color:{fill};color:{ink}}}"
            for idx, (fill, ink) in enumerate(in_order)
        )

    # On a dark page the high end must be the bright one.
    return (
        f":root{{--mlstm:{MLSTM_COLOUR};--slstm:{SLSTM_COLOUR}}}\n"
        + rules(steps)
        + "\n@media (prefers-color-scheme:dark){"
        + ":root{--mlstm:#ff9a52;--slstm:#6cc0f5}"
        + rules(steps[::-1])
        + "}\n"
    )


def _hash(content: str) -> str:
    digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return f"sha256-{digest}"
