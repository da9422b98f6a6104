"""The form of a whole RunSpec: every field of it, generated, and the way from the fields to a spec and back.

form = SpecForm(on_change=lambda part, name: ...)
form.set(max_steps=8, data="rows.jsonl")
form.spec
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pydantic
from ipywidgets import Widget

from nbtune.errors import SpecError
from nbtune.peft.config import PeftConfig
from nbtune.peft.configs.lora import LoraConfig
from nbtune.spec import DataSpec, ModelSpec, RunSpec, Setting, TrainingSpec, settings
from nbtune_widgets.form import Field, FieldError, Group, Look

FULL = "full"
TARGETS, LAYERS = "method.target_modules", "method.layers_to_transform"
PICKED = (TARGETS, LAYERS, "method.rank_pattern")  # what the module picker says
SOURCE = "data.source"  # which stands beside what there is to choose from
PARTS = ("model", "data", "training", "tracking")


class FormError(SpecError):
    """The form holds something that is no RunSpec; the fields say what."""


class SpecForm:
    """Fields by the path of their setting, in groups by part; `method` is a peft type or "full".

    Args:
        on_change: Told the part and the name of a setting that was changed, by a person or by code.
    """

    def __init__(self, on_change: Callable[[str, str], None]) -> None:
        self.method: str = str(LoraConfig.peft_type)
        self._on_change = on_change
        self._rows: DataSpec | None = None  # data given as Python objects, which no field can hold
        self._blamed: set[str] = set()
        self._look = Look()
        self._common = self._made(settings(FULL))
        grouped = [field for path, field in self._common.items() if path != SOURCE]
        self.groups = {part: Group([f for f in grouped if f.setting.part == part]) for part in PARTS}
        self._of_method: dict[str, dict[str, Field]] = {}  # made when first chosen: there are many methods
        self._method_groups: dict[str, Group] = {}

    @property
    def fields(self) -> dict[str, Field]:
        """Every field with the chosen method, by the path of its setting."""
        if self.method != FULL and self.method not in self._of_method:
            made = self._made([found for found in settings(config(self.method)) if found.part == "method"])
            self._of_method[self.method] = made
            self._method_groups[self.method] = Group([field for path, field in made.items() if path not in PICKED])
        return {**self._common, **self._of_method.get(self.method, {})}

    @property
    def method_group(self) -> Group | None:
        """The fields of the chosen method but PICKED, which stand below the map; None for "full"."""
        _ = self.fields  # makes the group
        return self._method_groups.get(self.method)

    @property
    def picked(self) -> dict[str, Field]:
        """The fields below the map, as far as the chosen method has them."""
        fields = self.fields
        return {path: fields[path] for path in PICKED if path in fields}

    @property
    def widgets(self) -> list[Widget]:
        """Every widget of the form, also of the methods that were chosen before, and the looks that they share."""
        groups = (*self.groups.values(), *self._method_groups.values())
        picked = (fields[path] for fields in self._of_method.values() for path in PICKED if path in fields)
        return [*(part.widget for part in (*groups, *picked)), *self._look.parts]

    @property
    def spec(self) -> RunSpec:
        """What the form says. Raises FormError where a field cannot be read or they do not fit each other."""
        unreadable = []
        for path, field in self.fields.items():
            try:
                _ = field.value
            except FieldError as error:
                unreadable.append(f"{field.setting.label} ({path}): {error}")
        if unreadable:
            raise FormError("A setting is not valid", "\n".join(unreadable))
        values: dict[str, Any] = {part: self.values(part) for part in PARTS}
        values["method"] = FULL if self.method == FULL else {"peft_type": self.method, **self.values("method")}
        if self._rows is not None and values["data"]["source"] == self._rows.source:
            given = {name: value for name, value in values["data"].items() if name != "source"}
            values["data"] = DataSpec.from_rows(self._rows.rows or (), **given)
        try:
            spec = RunSpec.model_validate(values)
        except pydantic.ValidationError as error:
            raise FormError("The settings do not fit each other", self._blame(error)) from error
        for path in self._blamed:
            self.fields[path].mark("") if path in self.fields else None
        self._blamed.clear()
        return spec

    @property
    def model(self) -> ModelSpec:
        """The model part alone, whatever the others hold. Raises FormError as `spec` does."""
        try:
            return ModelSpec(**self.values("model"))
        except pydantic.ValidationError as error:
            raise FormError("The settings do not fit each other", self._blame(error)) from error

    def optimizer_bytes(self, sizes: list[int]) -> int:
        """What the chosen optimiser keeps of trained tensors of these sizes; of the usual one where none is chosen."""
        from nbtune.models import default_device

        optim = self.fields["training.optim"]
        training = TrainingSpec() if optim.error else TrainingSpec(optim=optim.value)
        return training.optimizer_bytes(sizes, default_device().type)

    def values(self, part: str) -> dict[str, Any]:
        """The values of one part's fields. Raises FormError naming a field that cannot be read."""
        values = {}
        for path, field in self.fields.items():
            if path.startswith(part + "."):
                try:
                    values[field.setting.name] = field.value
                except FieldError as error:
                    raise FormError(f"{field.setting.label} is not valid", str(error)) from error
        return values

    def set(self, **changes: Any) -> None:
        """Fill in settings by name (`max_steps=8`, `"training.seed"`) or whole parts (`data=rows`, `method="full"`).

        Raises SpecError for an unknown name or a value that is not allowed, and changes nothing then.
        """
        parts = {name: changes.pop(name) for name in tuple(changes) if name in RunSpec.model_fields}
        spec = self.spec
        if parts:
            spec = RunSpec.from_dict({**{name: getattr(spec, name) for name in RunSpec.model_fields}, **parts})
        self.load(spec.updated(**changes) if changes else spec)

    def load(self, spec: RunSpec) -> None:
        """Fill in every field."""
        self._rows = spec.data if spec.data.rows is not None else None
        self.method = FULL if spec.method == FULL else str(spec.method.peft_type)
        for path, field in self.fields.items():
            part, name = path.split(".", 1)
            field.value = getattr(getattr(spec, part), name)

    def _made(self, wanted: list[Setting]) -> dict[str, Field]:
        fields = {found.path: Field(found, self._look) for found in wanted}
        for field in fields.values():
            field.on_change = self._changed
        return fields

    def _changed(self, field: Field) -> None:
        part = field.setting.part
        group = self.method_group if part == "method" else self.groups[part]
        if group is not None:
            group.refresh()
        self._on_change(part, field.setting.name)

    def _blame(self, error: pydantic.ValidationError) -> str:
        """Mark the fields that an error of the whole spec means, and return its text."""
        reasons = []
        for item in error.errors():
            reason = item["msg"].removeprefix("Value error, ")
            path = ".".join(map(str, item["loc"][:2]))
            named = [known for known in self.fields if known in reason or known.split(".", 1)[1] in reason.split()]
            for known in [path] if path in self.fields else named[:1]:
                self.fields[known].mark(reason)
                self._blamed.add(known)
            reasons.append(reason)
        return "\n".join(reasons)


def config(kind: str) -> PeftConfig:
    """The default config of a method."""
    return PeftConfig.from_dict({"peft_type": kind})
