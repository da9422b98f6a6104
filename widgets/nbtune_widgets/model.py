"""The Model step: what is here to choose from, what the chosen model is, and what each precision of it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from nbtune.errors import NbtuneError
from nbtune.spec import RunSpec
from nbtune_widgets import _cards
from nbtune_widgets._frame import set_class
from nbtune_widgets._page import Host, replace
from nbtune_widgets.specform import FULL, SpecForm

if TYPE_CHECKING:
    from nbtune.models import Known, ModelInfo

_WHOLE = {"model.load_in_4bit": False, "model.load_in_8bit": False}
_IN_4 = {"model.load_in_4bit": True, "model.load_in_8bit": False}
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "32-bit": {"model.dtype": "float32", **_WHOLE},
    "16-bit": {"model.dtype": "bfloat16", **_WHOLE},
    "8-bit": {"model.dtype": "auto", "model.load_in_8bit": True, "model.load_in_4bit": False},
    "4-bit": {"model.dtype": "auto", "model.bnb_4bit_use_double_quant": False, **_IN_4},
    "4-bit, double": {"model.dtype": "auto", "model.bnb_4bit_use_double_quant": True, **_IN_4},
}
_KINDS = {"packaged": "Packaged", "recent": "Recent", "local": "In this folder", "cached": "Downloaded"}


class ModelPage:
    """The form of the model, models to choose by a click, facts, and precisions with their memory."""

    def __init__(self, form: SpecForm, host: Host) -> None:
        self._form = form
        self._host = host
        self._info: ModelInfo | None = None
        self._available: int | None = None  # bytes, one figure for all precisions
        self.models: dict[str, widgets.Button] = {}
        self._known = widgets.VBox()
        self.facts = widgets.HTML(layout=widgets.Layout(flex="1 1 330px", min_width="0"))
        self.precisions = {name: widgets.Button(description=name) for name in PRECISIONS}
        for name, button in self.precisions.items():
            button.add_class("nt-method")
            button.on_click(host.act(lambda name=name: self.choose_precision(name)))
        heading = widgets.HTML('<div class="nt-heading">Precision of the base weights, and what a run takes</div>')
        cards = widgets.HBox(list(self.precisions.values()), layout=widgets.Layout(flex_flow="row wrap"))
        cards.add_class("nt-precisions")
        self._precision = widgets.VBox([heading, cards], layout=widgets.Layout(flex="1 1 420px", min_width="0"))
        below = widgets.HBox([self.facts, self._precision], layout=widgets.Layout(flex_flow="row wrap"))
        below.add_class("nt-columns")
        self.widget = widgets.VBox([self._known, form.groups["model"].widget, below])

    def offer(self, known: Sequence[Known], recent: Sequence[str]) -> None:
        """Show the models that are here, and those of the last runs, as buttons."""
        named = [(model.kind, model.name, _cards.size(model.size)) for model in known]
        here = {name for _, name, _ in named}
        named += [("recent", name, "trained before") for name in recent if name not in here]
        lines = []
        self.models = {}
        for kind, title in _KINDS.items():
            of_kind = [(name, hint) for found, name, hint in named if found == kind]
            if of_kind:
                buttons = [self._model_button(name, hint) for name, hint in of_kind]
                label = f'<span class="nt-soft nt-small">{title}</span>'
                head = widgets.HTML(label, layout=widgets.Layout(width="104px"))
                lines.append(widgets.HBox([head, *buttons], layout=widgets.Layout(flex_flow="row wrap")))
        for line in lines:
            line.add_class("nt-known")
        replace(self._known, lines)
        self._form.fields["model.name"].offer(list(self.models))
        self._mark_chosen()

    def show(self, info: ModelInfo | None) -> None:
        """Show what the chosen model is; None while that is not known."""
        self._info = info
        self.facts.value = _cards.model(info) if info is not None else ""
        self._precision.layout.display = None if info is not None else "none"
        self._mark_chosen()

    def choose_precision(self, name: str) -> None:
        """As a click on its card."""
        from nbtune.models import compute_dtype, default_device

        changes = dict(PRECISIONS[name])
        usual = str(compute_dtype("auto", default_device())).removeprefix("torch.")
        if self._form.method != FULL and changes["model.dtype"] == usual:
            changes["model.dtype"] = "auto"
        self._host.change(changes, name)

    def refresh(self, spec: RunSpec) -> None:
        """Ask for the plan of each precision; the weights alone are said at once."""
        from nbtune.models import compute_dtype, default_device

        self._mark_chosen()
        self._available = None
        info = self._info
        if info is None:
            return
        device = default_device()
        for name, button in self.precisions.items():
            whole = PRECISIONS[name].items() >= _WHOLE.items()
            button.layout.display = None if whole or spec.method != "full" else "none"
            if spec.method == "full" and not whole:
                set_class(button, "nt-on", on=False)
                continue
            other = spec.updated(**PRECISIONS[name])
            size = compute_dtype(other.model.dtype, device).itemsize
            weights = info.weight_bytes(size, other.model.quantised_bytes)
            set_class(button, "nt-on", on=_bytes_of(other, device) == _bytes_of(spec, device))
            _describe(button, name, weights)
            self._host.ask(
                f"precision {name}",
                "Planning the other precisions …",
                lambda other=other, name=name, weights=weights: self._plan(other, name, weights),
                idle=True,
            )

    def _plan(self, spec: RunSpec, name: str, weights: int) -> None:
        """Say on the card what a run would take and whether it fits."""
        from nbtune.plan import plan

        button = self.precisions[name]
        try:
            planned = plan(spec, available_bytes=self._available)
        except NbtuneError as error:  # the method does not suit the model; said at its field
            _describe(button, name, weights, run=error.title)
            return
        self._available = planned.available_bytes
        kind, text = _cards.fit(planned)
        _describe(button, name, weights, f"a run {_cards.size(planned.peak_bytes)}", text)
        for other in ("fits", "tight", "no"):
            set_class(button, f"nt-{other}", on=other == kind)

    def _model_button(self, name: str, hint: str) -> widgets.Button:
        short = name.rsplit("/", 1)[-1] if name.startswith(".") else name
        button = self._host.button(short, lambda: self._host.change({"model.name": name}, short), f"{name}, {hint}")
        button.add_class("nt-chipped")
        self.models[name] = button
        return button

    def _mark_chosen(self) -> None:
        chosen = self._form.fields["model.name"].control.value
        for name, button in self.models.items():
            set_class(button, "nt-on", on=name == chosen)


def _bytes_of(spec: RunSpec, device: Any) -> tuple[str, float | None]:
    """What tells one precision from another: the floats it computes with, and bytes of a quantised weight."""
    from nbtune.models import compute_dtype
    from nbtune.models.training import trained_model

    model = trained_model(spec)
    return str(compute_dtype(model.dtype, device)), model.quantised_bytes


def _describe(button: widgets.Button, name: str, weights: int, run: str = "", fit: str = "") -> None:
    lines = [name, f"weights {_cards.size(weights)}", run or "a run: …", fit]
    button.description = "\n".join(line for line in lines if line)
