"""The Method step: a method by its card, its settings, and the modules of the real model that it adapts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets

from nbtune.errors import AdapterError, NbtuneError
from nbtune.peft.config import LayerConfig, PeftConfig, PeftType
from nbtune.spec import RunSpec
from nbtune_widgets._frame import set_class
from nbtune_widgets._page import Host
from nbtune_widgets.modules import ModulePicker
from nbtune_widgets.selection import Choice
from nbtune_widgets.specform import FULL, LAYERS, TARGETS, SpecForm, config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbtune.models import ModelInfo

# Where configs of a family are (nbtune.peft.configs), and what the form calls it.
COMMON = "common"
_FAMILIES = {
    COMMON: "Common", "lora": "LoRA", "low_rank": "Low rank", "vectors": "Vectors", "rotations": "Rotations",
    "shared": "Shared matrices", "sparse": "Sparse", "prompts": "Prompts", FULL: "Full",
}  # fmt: skip
_NO_MAP = (PeftType.LN_TUNING, PeftType.TRAINABLE_TOKENS)  # norms and embeddings; the map has linear layers


class Recipe(NamedTuple):
    """A method under the name that people look for, with the settings that make it."""

    name: str
    words: str
    method: str
    settings: Mapping[str, Any]


_WHOLE = {"model.load_in_4bit": False, "model.load_in_8bit": False}
_IN_4_BITS = {"model.load_in_8bit": False, "model.load_in_4bit": True}
RECIPES = (
    Recipe("LoRA", "low-rank update; the default", "LORA", {"method.use_dora": False, **_WHOLE}),
    Recipe("QLoRA 4-bit", "base in 4 bits, a third of the memory", "LORA", {"method.use_dora": False, **_IN_4_BITS}),
    Recipe("DoRA", "magnitude and direction", "LORA", {"method.use_dora": True, **_WHOLE}),
    Recipe("AdaLoRA", "ranks found while training", "ADALORA", {}),
    Recipe("OFT", "rotations, which keep angles", "OFT", {}),
    Recipe("IA3", "scales only, very few parameters", "IA3", {}),
)


class MethodPage:
    """Cards of methods in families, the fields of the chosen one, and the module picker.

    Args:
        form: Of the whole run.
        host: The wizard.
        on_method: Told that another method is chosen.
    """

    def __init__(self, form: SpecForm, host: Host, on_method: Callable[[], None]) -> None:
        self._form = form
        self._host = host
        self._on_method = on_method
        self._skeleton: PreTrainedModel | None = None  # the chosen model without weights
        self._refused: dict[str, str] = {}  # settings that do not suit the model, and why
        self.picker = ModulePicker(self._picked, host.act)
        self.methods, self.recipes = self._make_cards()
        families = [(label, family) for family, label in _FAMILIES.items()]
        self.families = widgets.ToggleButtons(options=families, style={"button_width": "auto"})
        self.families.add_class("nt-tabs")
        self.families.observe(host.act(self._show_family), names="value")
        self.cards = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap", margin="8px 0 0"))
        self._fields = widgets.VBox()
        heading = widgets.HTML('<div class="nt-heading">Method</div>')
        left = widgets.VBox(
            [heading, self.families, self.cards, self._fields],
            layout=widgets.Layout(flex="1 1 350px", min_width="0"),
        )
        self.modules = widgets.VBox(layout=widgets.Layout(flex="2 1 440px", min_width="0"))
        self.modules.add_class("nt-picked")
        self.widget = widgets.HBox([left, self.modules], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget.add_class("nt-columns")
        self._show_family()

    def choose(self, name: str) -> None:
        """As a click on a method's card: `LORA`, `full`, ..."""
        self._form.method = name
        if name not in [recipe.method for recipe in RECIPES]:
            self.families.value = _family(name)
        group = self._form.method_group
        self._fields.children = [group.widget] if group is not None else []
        picked = self._form.picked
        self.picker.choosing.layout.display = None if TARGETS in picked and name not in _NO_MAP else "none"
        self.modules.children = [self.picker.widget, *(field.widget for field in picked.values())]
        self.modules.layout.display = "none" if name == FULL else None
        self.mark_cards()
        self._on_method()

    def use(self, recipe: Recipe) -> None:
        """As a click on the card of a recipe."""
        self.choose(recipe.method)
        for path, value in recipe.settings.items():
            self._form.fields[path].value = value

    def mark_cards(self) -> None:
        """Show which cards are what the form says."""
        for kind, button in self.methods.items():
            set_class(button, "nt-on", on=kind == self._form.method)
        fields = self._form.fields
        for recipe in RECIPES:
            same = recipe.method == self._form.method and all(
                fields[path].holds(value) for path, value in recipe.settings.items()
            )
            set_class(self.recipes[recipe.name], "nt-on", on=same)

    def show(self, info: ModelInfo | None, skeleton: PreTrainedModel | None) -> None:
        """Draw the map of this model; None while it is not known."""
        from nbtune.peft import LoraConfig
        from nbtune.peft.targets import find_targets, walk

        self._skeleton = skeleton
        if info is not None and skeleton is not None:
            every = find_targets(skeleton, LoraConfig(target_modules="all-linear"))
            self.picker.show(info, list(walk(skeleton)), every)

    def refresh(self, spec: RunSpec) -> None:
        """There is nothing to read but what `count` reads with every change."""

    def count(self) -> None:
        """Give the skeleton the adapter: what it adapts and trains, or which setting does not suit the model.

        On the worker's thread.
        """
        if self._skeleton is None or self._form.method == FULL:
            return
        version = self.picker.version
        for path, reason in self._refused.items():
            if path in self._form.fields and self._form.fields[path].error == reason:
                self._form.fields[path].mark("")
        self._refused.clear()
        try:
            method = PeftConfig.from_dict({"peft_type": self._form.method, **self._form.values("method")})
            paths, sizes = self._adapted(self._skeleton, method)
        except NbtuneError as error:
            self.picker.refuse(error.title)
            if isinstance(error, AdapterError):
                self._refuse(error)
        else:
            trained = self._form.optimizer_bytes(sizes) + 8 * sum(sizes)  # fp32 weights and gradients
            self.picker.mark(paths, sum(sizes), trained, version)
        if self._form.method_group is not None:
            self._form.method_group.refresh()  # what is wrong must be seen

    def _adapted(self, skeleton: PreTrainedModel, method: PeftConfig) -> tuple[Collection[str], list[int]]:
        """The paths of the modules that a method adapts, and the sizes of the tensors that it trains."""
        from nbtune.models import attach_adapter
        from nbtune.peft.targets import find_targets

        paths = find_targets(skeleton, method) if isinstance(method, LayerConfig) else []
        adapted = attach_adapter(copy.deepcopy(skeleton), RunSpec(model=self._form.model, method=method))
        return paths, [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]

    def _refuse(self, error: AdapterError) -> None:
        """Say an error of the method at the field that it is about."""
        from nbtune.check import setting_of

        path = setting_of(f"{error.title} {error.message}", config(self._form.method))
        if path is not None:
            reason = " ".join(part for part in (error.message or error.title, error.remedy) if part)
            self._refused[path] = reason
            self._form.fields[path].mark(reason)

    def _picked(self, choice: Choice) -> None:
        """The map was clicked: the fields say so, and everything follows from them."""
        layers, targets = (self._form.fields[path] for path in (LAYERS, TARGETS))
        if isinstance(choice.target_modules, str):  # beside a text PEFT takes no layers: they go first
            layers.value = choice.layers_to_transform
            targets.value = choice.target_modules
        else:
            targets.value = choice.target_modules
            layers.value = choice.layers_to_transform

    def _make_cards(self) -> tuple[dict[str, widgets.Button], dict[str, widgets.Button]]:
        look = {"layout": widgets.Layout(), "style": widgets.ButtonStyle()}  # one for all, as in form.Look
        methods = {str(kind): widgets.Button(description=_card(kind), **look) for kind in (*PeftType, FULL)}
        for kind, button in methods.items():
            button.add_class("nt-method")
            button.on_click(self._host.act(lambda kind=kind: self.choose(kind)))
        recipes = {recipe.name: recipe for recipe in RECIPES}
        buttons = {name: widgets.Button(description=f"{name}\n{one.words}", **look) for name, one in recipes.items()}
        for name, button in buttons.items():
            button.add_class("nt-method")
            button.on_click(self._host.act(lambda recipe=recipes[name]: self.use(recipe)))
        return methods, buttons

    def _show_family(self) -> None:
        if self.families.value == COMMON:
            self.cards.children = list(self.recipes.values())
        else:
            self.cards.children = [b for kind, b in self.methods.items() if _family(kind) == self.families.value]


def _card(kind: str) -> str:
    """A method in two lines: its name, and the first words of its class's docstring."""
    if kind == FULL:
        return "Full\nEvery weight is trained"
    words = (type(config(kind)).__doc__ or "").partition("(")[0].partition(";")[0].strip(" .")
    return f"{PeftType(kind).label}\n{words}"


def _family(kind: str) -> str:
    return FULL if kind == FULL else PeftType(kind).family
