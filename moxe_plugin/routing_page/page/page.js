"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const text = get("text");
  const tokens = [...text.querySelectorAll(".t")];
  const slider = get("layer");
  const details = get("details");
  const rows = [...document.querySelectorAll("#summary tbody tr")];
  const hint = details.firstElementChild;

  let kept = null; // the token that a click or a key has chosen
  let shown = null; // the token that the panel describes

  const valueOf = (key, layer, i) => (key === "loss" ? data.nll : data.layers[layer][key])[i];
  const layerIdx = () => Number(slider.value);

  function scaleOf(key, layer) {
    const { low, high } = data.scales[key];
    if (!get("own-scale").checked) return [low, high];
    const values = tokens.map((_, i) => valueOf(key, layer, i)).sort((a, b) => a - b);
    return data.scaleEnds.map((share) => values[Math.round(share * (values.length - 1))]);
  }

  function stepOf(value, [low, high]) {
    if (high <= low) return 0;
    const step = Math.floor(((value - low) / (high - low)) * data.steps);
    return Math.min(Math.max(step, 0), data.steps - 1);
  }

  function mark(element, layer, i) {
    const { marks, shares } = data.layers[layer];
    element.dataset.mark = marks[i];
    if (shares !== null) element.style.setProperty("--share", shares[i]);
  }

  function showLayer() {
    const layer = layerIdx();
    const key = get("colour").value;
    const scale = scaleOf(key, layer);
    tokens.forEach((token, i) => {
      token.dataset.step = stepOf(valueOf(key, layer, i), scale);
      mark(token, layer, i);
    });
    get("layer-name").textContent = layer;
    slider.setAttribute("aria-valuetext", `layer ${layer}`);
    get("low").textContent = `≤ ${scale[0].toFixed(2)}`;
    get("high").textContent = `≥ ${scale[1].toFixed(2)}`;
    rows.forEach((row, i) => (i === layer ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current")));
    describe();
  }

  // Text goes into the page as text only, never as markup.
  function make(tag, className, content, parent) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    parent.append(element);
    return element;
  }

  function describe() {
    tokens.forEach((token, i) => {
      token.classList.toggle("shown", i === shown);
      token.classList.toggle("kept", i === kept);
    });
    if (shown === null) return details.replaceChildren(hint);
    details.replaceChildren();
    describeToken(shown);
    describeExperts(shown, data.layers[layerIdx()]);
    describeLayers(shown);
  }

  function describeToken(i) {
    const owner = data.owners[i];
    const count = data.owners.filter((o) => o === owner).length;
    const signs = { " ": "·", "\n": "↵", "\t": "→" };
    const name = tokens[owner].textContent.replace(/[ \n\t]/g, (c) => signs[c]);
    make("h2", "", name, details);
    if (count > 1) make("p", "parts", `Part ${i - owner + 1} of the ${count} tokens that hold these characters.`, details);
    make("p", "place", `token ${i + 1} of ${tokens.length}, id ${data.ids[i]}`, details);

    const layer = data.layers[layerIdx()];
    const list = make("dl", "", undefined, details);
    const row = (id, label, value) => {
      make("dt", "", label, list);
      make("dd", "", value, list).id = id;
    };
    row("loss", "loss", `${data.nll[i].toFixed(4)} nats`);
    row("probability", "probability", `${(100 * Math.exp(-data.nll[i])).toPrecision(3)} %`);
    if (layer.difficulty !== null) row("difficulty", "difficulty", layer.difficulty[i].toFixed(4));
    row("entropy", "entropy", layer.entropy[i].toFixed(4));
  }

  function describeExperts(i, layer) {
    make("h3", "", `Experts of layer ${layerIdx()}`, details);
    const block = make("div", "", undefined, details);
    block.id = "experts";
    const head = make("div", "expert head", undefined, block);
    for (const label of ["", "", "probability", "weight"]) make("span", "", label, head);
    data.experts.forEach((name, expert) => {
      const place = layer.experts[i].indexOf(expert);
      const row = make("div", place < 0 ? "expert" : "expert chosen", undefined, block);
      if (data.numMlstm !== null) row.dataset.mark = expert < data.numMlstm ? "m" : "s";
      make("span", "name", (place < 0 ? "" : "▸ ") + name, row);
      const track = make("span", "track", undefined, row);
      make("span", "fill", undefined, track).style.width = `${100 * layer.probs[i][expert]}%`;
      if (layer.difficulty !== null) {
        make("span", "tick", undefined, track).style.left = `${100 * layer.unbiased[i][expert]}%`;
      }
      make("span", "prob", layer.probs[i][expert].toFixed(4), row);
      make("span", "weight", place < 0 ? "" : layer.weights[i][place].toFixed(4), row);
    });
    if (layer.difficulty !== null) {
      make("p", "", "The upright line is the probability before the difficulty bias.", details);
    }
  }

  function describeLayers(i) {
    const key = get("colour").value;
    make("h3", "", `All layers: ${data.scales[key].label}`, details);
    const block = make("div", "across", undefined, details);
    data.layers.forEach((_, layer) => {
      const value = valueOf(key, layer, i);
      const button = make("button", "t", value.toFixed(2), block);
      button.type = "button";
      button.title = `layer ${layer}`;
      button.dataset.step = stepOf(value, scaleOf(key, layer));
      mark(button, layer, i);
      if (layer === layerIdx()) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => chooseLayer(layer));
    });
  }

  function chooseLayer(layer) {
    slider.value = layer;
    showLayer();
  }

  function keep(i) {
    kept = shown = i;
    describe();
    if (i !== null) tokens[i].scrollIntoView({ block: "nearest" });
  }

  const tokenAt = (event) => event.target.closest("#text .t");

  text.addEventListener("pointerover", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    shown = Number(token.dataset.i);
    describe();
  });
  text.addEventListener("pointerleave", () => {
    if (kept === null) return; // the last token stays, so that its numbers can be read
    shown = kept;
    describe();
  });
  text.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token) keep(Number(token.dataset.i));
  });
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = tokens.length - 1;
    const moves = {
      ArrowLeft: () => keep(kept === null ? last : Math.max(kept - 1, 0)),
      ArrowRight: () => keep(kept === null ? 0 : Math.min(kept + 1, last)),
      Home: () => keep(0),
      End: () => keep(last),
      ArrowUp: () => chooseLayer(layerIdx() + 1),
      ArrowDown: () => chooseLayer(layerIdx() - 1),
      Escape: () => keep(null),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });

  get("controls").addEventListener("submit", (event) => event.preventDefault());
  slider.addEventListener("input", showLayer);
  get("colour").addEventListener("change", showLayer);
  get("own-scale").addEventListener("change", showLayer);
  rows.forEach((row, i) => row.addEventListener("click", () => chooseLayer(i)));
  showLayer();
})();
