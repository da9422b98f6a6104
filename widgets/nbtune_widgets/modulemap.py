"""The map of modules as one small widget: a grid of cells, clicked, painted with the pointer, or walked with arrows.

A front end without anywidget shows nothing of it: `ready` stays False then, and the plain rows of the picker do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anywidget
import traitlets

Cell = tuple[int, int]  # index of the row, number of the layer

_ESM = """
const make = (tag, parent, attributes, text) => {
  const node = parent.appendChild(document.createElement(tag));
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text) node.textContent = text;
  return node;
};

function render({ model, el }) {
  // JupyterLab would move to another cell at an arrow key.
  const grid = make("div", el, { class: "nt-map", role: "grid", "aria-multiselectable": "true",
    "aria-label": "Modules to adapt: kinds down, layers across", "data-lm-suppress-shortcuts": "true" });
  let cells = new Map(), at = "0,0", painting = null;

  const isOn = (cell) => cell.getAttribute("aria-selected") === "true";
  const turn = (cell, on) => cell.setAttribute("aria-selected", on);
  const send = (picked, on) => model.send({ cells: picked.map((cell) => cell.dataset.at.split(",").map(Number)), on });
  const line = (test) => [...cells.values()].filter(test);
  const toggle = (picked) => {
    const on = !picked.every(isOn);
    picked.forEach((cell) => turn(cell, on));
    send(picked, on);
  };
  const focus = (key) => {
    const cell = cells.get(key);
    if (!cell) return;
    cells.get(at).tabIndex = -1;
    at = key;
    cell.tabIndex = 0;
    cell.focus();
  };

  const build = () => {
    const rows = model.get("rows"), layers = model.get("layers");
    const every = layers <= 40 ? 5 : 10;
    grid.replaceChildren();
    grid.style.setProperty("--layers", layers);
    cells = new Map();
    const ruler = make("div", grid, { role: "row" });
    make("span", ruler, { role: "columnheader" });
    for (let layer = 0; layer < layers; layer++) {
      const head = make("div", ruler, { role: "columnheader" });
      const all = make("button", head, { tabindex: -1, title: `Layer ${layer}: all or none`,
        "aria-label": `Layer ${layer}, all or none` }, layer % every ? "·" : String(layer));
      all.onclick = () => toggle(line((cell) => cell.dataset.at.endsWith(`,${layer}`)));
    }
    make("span", ruler, { role: "columnheader" });
    rows.forEach(({ label, shape }, index) => {
      const row = make("div", grid, { role: "row" });
      const head = make("div", row, { role: "rowheader" });
      make("button", head, { title: `${label}: all or none` }, label).onclick = () =>
        toggle(line((cell) => cell.dataset.at.startsWith(`${index},`)));
      for (let layer = 0; layer < layers; layer++) {
        if (rows[index].cells[layer] === ".") { make("span", row, { role: "gridcell" }); continue; }
        const key = `${index},${layer}`;
        const cell = make("button", row, { role: "gridcell", tabindex: -1, title: `${label}, layer ${layer}`,
          "aria-label": `${label}, layer ${layer}` });
        cell.dataset.at = key;
        cells.set(key, cell);
      }
      make("span", row, { role: "gridcell", class: "nt-shape" }, shape);
    });
    if (!cells.has(at)) at = cells.keys().next().value;
    if (at) cells.get(at).tabIndex = 0;
    mark();
  };
  const mark = () => model.get("rows").forEach((row, index) =>
    [...row.cells].forEach((state, layer) => {
      const cell = cells.get(`${index},${layer}`);
      if (cell) turn(cell, state === "1");
    }));

  grid.addEventListener("pointerdown", (event) => {
    const cell = event.target.closest("[data-at]");
    if (!cell || event.button) return;
    painting = { on: !isOn(cell), picked: [cell] };
    turn(cell, painting.on);
  });
  grid.addEventListener("pointerover", (event) => {
    const cell = painting && event.target.closest("[data-at]");
    if (!cell || painting.picked.includes(cell)) return;
    painting.picked.push(cell);
    turn(cell, painting.on);
  });
  const lift = () => {
    if (painting) send(painting.picked, painting.on);
    painting = null;
  };
  window.addEventListener("pointerup", lift);
  grid.addEventListener("click", (event) => {  // detail 0: the space bar or Enter, not a pointer
    const cell = event.target.closest("[data-at]");
    if (cell && event.detail === 0) toggle([cell]);
    if (cell) focus(cell.dataset.at);
  });
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const cell = event.target.closest("[data-at]");
    if (!step || !cell) return;
    event.preventDefault();
    const [row, layer] = cell.dataset.at.split(",").map(Number);
    const next = `${row + step[0]},${layer + step[1]}`;
    if (event.shiftKey && cells.has(next) && isOn(cells.get(next)) !== isOn(cell)) toggle([cells.get(next)]);
    focus(next);
  });
  model.on("change:layers", build);
  model.on("change:rows", () => {
    const same = model.get("rows").map((row) => row.label).join() === grid.dataset.kinds;
    grid.dataset.kinds = model.get("rows").map((row) => row.label).join();
    same ? mark() : build();
  });
  build();
  model.set("ready", true);
  model.save_changes();
  return () => window.removeEventListener("pointerup", lift);
}
export default { render };
"""


class ModuleMap(anywidget.AnyWidget):
    """Kinds down, layers across. What is picked is told to `on_pick`; what is shown as chosen comes by `show`."""

    _esm = _ESM
    rows = traitlets.List(traitlets.Dict()).tag(sync=True)  # label, shape, cells: a letter a layer, 1, 0 or . for none
    layers = traitlets.Int(0).tag(sync=True)
    ready = traitlets.Bool(default_value=False).tag(sync=True)  # set by a front end that shows it

    def __init__(self, on_pick: Callable[[list[Cell], bool], None]) -> None:
        super().__init__()
        self._on_pick = on_pick
        self.on_msg(self._told)

    def show(self, rows: Sequence[dict[str, str]], layers: int) -> None:
        """Draw rows of `label`, `shape` and `cells`."""
        if layers != self.layers:
            with self.hold_sync():
                self.rows, self.layers = list(rows), layers
        else:
            self.rows = list(rows)

    def _told(self, _: Any, content: dict[str, Any], __: Any) -> None:
        self._on_pick([(row, layer) for row, layer in content["cells"]], content["on"])
