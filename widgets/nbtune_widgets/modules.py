"""The module picker: kinds of modules by layers of the chosen model, as a map that is clicked by row and by range.

picker = ModulePicker(on_pick=lambda kinds, layers: ...)
picker.show(describe(spec.model))
picker.mark(paths, trainable=2_949_120)     # what the config really adapts, as `find_targets` says
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

import ipywidgets as widgets

from nbtune.models import ModelInfo, ModuleInfo

Pick = Callable[[list[str], list[int] | None], None]  # kinds, layers (None: all)


class ModulePicker:
    """Kinds down, layers across. A click tells `on_pick`; what is adapted comes back through `mark`."""

    def __init__(self, on_pick: Pick) -> None:
        self.kinds: dict[str, widgets.Button] = {}
        self._on_pick = on_pick
        self._modules: Sequence[ModuleInfo] = ()
        self._parameters = 0
        self._layer_count = 0
        self._chosen: set[str] = set()
        self._cells: dict[str, widgets.HTML] = {}
        self._marking = False
        self.presets = {
            name: widgets.Button(description=name) for name in ("attention", "MLP", "all linear", "upper half")
        }
        for name, button in self.presets.items():
            button.on_click(lambda _, name=name: self.preset(name))
        self.layers = widgets.IntRangeSlider(
            description="layers", min=0, max=1, value=(0, 1), continuous_update=False,
            layout=widgets.Layout(width="100%"), style={"description_width": "104px"})  # fmt: skip
        self.layers.add_class("nt-layers")
        self.layers.observe(lambda _: None if self._marking else self._tell(), names="value")
        self._rows = widgets.VBox()
        self.summary = widgets.HTML()
        heading = widgets.HTML('<div class="nt-heading">Target modules</div>', layout=widgets.Layout(flex="1 1 auto"))
        top = widgets.HBox([heading, *self.presets.values()], layout=widgets.Layout(flex_flow="row wrap"))
        top.add_class("nt-presets")
        self.map = widgets.VBox([top, self._rows, self.layers])
        self.widget = widgets.VBox([self.map, self.summary])

    def show(self, info: ModelInfo) -> None:
        """Draw the map of this model's blocks."""
        self._modules = [module for module in info.modules if module.layer is not None]
        self._parameters = info.parameters
        self._layer_count = max((module.layer or 0 for module in self._modules), default=0) + 1
        shapes: dict[str, str] = {}
        for module in self._modules:
            shapes.setdefault(module.kind, f"{module.in_features}→{module.out_features}")
        self.kinds = {kind: widgets.Button(description=kind, tooltip=f"Adapt {kind} or not") for kind in shapes}
        self._cells = {kind: widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0")) for kind in shapes}
        rows = [_row(widgets.HTML(), _ruler(self._layer_count), "")]
        for kind, shape in shapes.items():
            button = self.kinds[kind]
            button.add_class("nt-kind")
            button.on_click(lambda _, kind=kind: self.toggle(kind))
            rows.append(_row(button, self._cells[kind], shape))
        self._rows.children = rows
        self._marking = True
        self.layers.max = self._layer_count - 1
        self.layers.value = (0, self._layer_count - 1)
        self._marking = False

    def mark(self, paths: Iterable[str], trainable: int) -> None:
        """Show which modules are adapted, and what that costs."""
        adapted = set(paths)
        chosen = [module for module in self._modules if module.name in adapted]
        self._chosen = {module.kind for module in chosen}
        places = {(module.kind, module.layer) for module in chosen}
        for kind, cells in self._cells.items():
            cells.value = _line(kind, [(kind, layer) in places for layer in range(self._layer_count)])
            (self.kinds[kind].add_class if kind in self._chosen else self.kinds[kind].remove_class)("nt-on")
        if chosen:
            numbers = [module.layer or 0 for module in chosen]
            self._marking = True
            self.layers.value = (min(numbers), max(numbers))
            self._marking = False
        share = f" ({100 * trainable / self._parameters:.2g} %)" if self._parameters else ""
        outside = len(adapted) - len(chosen)
        more = f" and {outside} outside the layers" if outside > 0 else ""
        what = f"{len(chosen)} of {len(self._modules)} modules{more} · " if chosen else ""
        if adapted and not chosen:  # none that the map shows
            what = f"{outside} modules · "
        self.summary.value = f'<div class="nt-b">{what}{trainable:,} trainable parameters{share}</div>'

    def refuse(self, reason: str) -> None:
        """Say why the choice adapts nothing."""
        self.summary.value = f'<div class="nt-invalid" role="alert">{escape(reason)}</div>'

    def toggle(self, kind: str) -> None:
        """As a click on the name of a row."""
        chosen = self._chosen ^ {kind}
        if not chosen:
            self.refuse("At least one kind of module has to be adapted.")
            return
        self._chosen = chosen
        self._tell()

    def preset(self, name: str) -> None:
        """As a click on one of the buttons above the map."""
        if name == "upper half":
            self.layers.value = (self._layer_count // 2, self._layer_count - 1)
            return
        attention = {module.kind for module in self._modules if _in_attention(module)}
        every = set(self.kinds)
        self._chosen = {"attention": attention, "MLP": every - attention}.get(name, every) or every
        self._tell()

    def _tell(self) -> None:
        first, last = self.layers.value
        whole = (first, last) == (0, self._layer_count - 1)
        kinds = [kind for kind in self.kinds if kind in self._chosen]
        if kinds:
            self._on_pick(kinds, None if whole else list(range(first, last + 1)))


def _in_attention(module: ModuleInfo) -> bool:
    return any("attn" in part or "attention" in part for part in module.name.split(".")[:-1])


def _row(name: widgets.DOMWidget, cells: widgets.HTML, shape: str) -> widgets.HBox:
    name.layout.width = "104px"
    size = widgets.HTML(f'<span class="nt-soft nt-small">{shape}</span>', layout=widgets.Layout(width="84px"))
    row = widgets.HBox([name, cells, size], layout=widgets.Layout(align_items="center"))
    row.add_class("nt-kinds")
    return row


def _line(kind: str, chosen: Sequence[bool]) -> str:
    cells = "".join(f'<i{" class=nt-on" if on else ""} title="{kind}, layer {n}"></i>' for n, on in enumerate(chosen))
    return f'<div class="nt-cells" role="img" aria-label="{kind}: {sum(chosen)} of {len(chosen)} layers">{cells}</div>'


def _ruler(layers: int) -> widgets.HTML:
    every = 5 if layers <= 40 else 10
    numbers = "".join(f"<b>{n if n % every == 0 else ''}</b>" for n in range(layers))
    return widgets.HTML(
        f'<div class="nt-cells" aria-hidden="true">{numbers}</div>',
        layout=widgets.Layout(flex="1 1 auto", min_width="0"),
    )
