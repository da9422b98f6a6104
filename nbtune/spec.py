"""RunSpec: the one declaration of a run.

Every setting is one field with its metadata beside it. The wizard's form, the CLI's flags, the YAML file, the papermill
parameters, the MLflow params and the reference table are all read from here (see `settings`), so a new setting is one
new field and nothing else.

    spec = RunSpec(model="smollm2-135m-instruct", data="stdlib-docs", method={"r": 16})
    spec.to_yaml("spec.yaml"); RunSpec.from_yaml("spec.yaml") == spec
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from nbtune.chat_templates import STANDARD, chat_template
from nbtune.errors import SpecError
from nbtune.peft.config import LayerConfig, PeftConfig, PeftType, PromptLearningConfig, config_class
from nbtune.peft.configs.lora import LoraConfig
from nbtune.presets import PRESETS
from nbtune.recipe import Step

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Optimiser = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lorafa"]
DataFormat = Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "preference", "text"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Row = dict[str, Any]

# The parts of a row, in all forms: what a mapping of columns can name.
COLUMNS = (
    "prompt", "completion", "system", "instruction", "input", "output", "messages", "conversations", "tools", "chosen",
    "rejected", "text",
)  # fmt: skip

# Methods that do not adapt a linear layer's weight: with no targets named they have those of PEFT.
_OWN_TARGETS = (PeftType.IA3, PeftType.LN_TUNING, PeftType.BEFT, PeftType.TRAINABLE_TOKENS)


def _field(
    default: Any = ...,
    *,
    help: str,
    label: str | None = None,
    unit: str | None = None,
    advanced: bool = False,
    sweepable: bool = False,
    **limits: Any,
) -> Any:
    """A pydantic field whose metadata the form, the CLI and the docs read."""
    extra = {"label": label, "unit": unit, "advanced": advanced, "sweepable": sweepable}
    return Field(default, description=help, json_schema_extra=extra, **limits)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSpec(_Part):
    """Which base model, and in which precision."""

    name: str = _field(
        "smollm2-135m-instruct",
        help="A packaged name, a hub id, a local folder or a .gguf file.",
        label="Model",
        min_length=1,
    )
    revision: str | None = _field(None, help="Branch, tag or commit of a hub model.", advanced=True)
    chat_template: str | None = _field(
        None,
        help=f"How chats are written: {', '.join(STANDARD)}, or a template in Jinja; none is the model's own.",
        advanced=True,
    )
    dtype: Dtype = _field(
        "auto",
        help="Precision of the base weights; auto is bfloat16 where this machine computes it well.",
        advanced=True,
    )
    load_in_4bit: bool = _field(
        False,
        help="Quantise the layers' linear weights to 4 bits (bitsandbytes): a quarter of the memory of 16, QLoRA.",
        label="Load in 4 bits",
    )
    load_in_8bit: bool = _field(
        False,
        help="Quantise the layers' linear weights to 8 bits (LLM.int8): half the memory of 16.",
        label="Load in 8 bits",
        advanced=True,
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _field(
        "nf4",
        help="The 16 values of 4 bits: nf4 has them where normally distributed weights are, fp4 is a floating point.",
        label="4-bit type",
        advanced=True,
    )
    bnb_4bit_use_double_quant: bool = _field(
        False,
        help="Quantise the scales of 4-bit weights too: saves 0.4 bits a weight, a little slower.",
        label="Double quantisation",
        advanced=True,
    )
    trust_remote_code: bool = _field(
        False, help="Run Python code that comes with the model. Only for a source you trust.", advanced=True
    )

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value:
            chat_template(value)  # raises a ValueError that names the standard ones
        return value or None

    @model_validator(mode="after")
    def _one_quantisation(self) -> ModelSpec:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; choose one")
        return self

    @property
    def quantised_bytes(self) -> float | None:
        """Bytes that a quantised weight takes, its share of the scales included; None where none is quantised."""
        if self.load_in_8bit:
            return 1.0
        if not self.load_in_4bit:
            return None
        # An fp32 scale per 64 weights; or one byte, and an fp32 scale per 256 of those.
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.bnb_4bit_use_double_quant else 4 / 64)


class SourceSpec(_Part):
    """Rows, and how to read them."""

    source: str = _field(
        "stdlib-docs",
        help="stdlib-docs, a .json, .jsonl, .csv, .parquet, .txt or .md file, a folder of them, or a hub dataset id.",
        label="Data",
        min_length=1,
    )
    format: DataFormat = _field("auto", help="Shape of a row; auto reads it from the columns.", advanced=True)
    columns: dict[str, str] | None = _field(
        None,
        help="What the parts of a row are made of: a column, or a text with columns in braces, as in"
        " prompt: '{question} {context}', completion: answer.",
        advanced=True,
    )
    split: str = _field("train", help="Split of a hub dataset to train on.", advanced=True)

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if unknown := [name for name in value or () if name not in COLUMNS]:
            raise ValueError(f"a row has no part {unknown[0]!r}; there are {', '.join(COLUMNS)}")
        return value or None

    @property
    def rows(self) -> tuple[Row, ...] | None:
        """The rows given in memory, or None where `source` names a place to read."""
        return None


class MixedSpec(SourceSpec):
    """Rows of another source, mixed in."""

    weight: float | None = _field(
        None, help="How many of its rows there are for each row of the first source; none takes all.", gt=0
    )


class DataSpec(SourceSpec):
    """Where the examples come from, what is done to them, and which are held out."""

    mix: list[MixedSpec] = _field(
        [],
        help="Other sources, as source and weight: the rows of it for each row of the first; without weight all.",
        label="Mix in",
        advanced=True,
    )
    recipe: list[Step] = _field(
        [],
        help="What is done to the rows, in this order: filter, length, deduplicate, decontaminate, sample, usable.",
        advanced=True,
    )
    eval_fraction: float = _field(
        0.05, help="Share of the rows held out to measure the loss on.", label="Held out", ge=0, lt=1
    )
    max_rows: int | None = _field(None, help="Use at most this many training rows.", unit="rows", ge=1, advanced=True)
    max_eval_rows: int = _field(
        128, help="Measure the held-out loss on at most this many rows.", unit="rows", ge=1, advanced=True
    )
    seed: int = _field(0, help="Seed of the split into training and held-out rows.", ge=0, advanced=True)

    # Rows given in memory: a source cannot name them, so they travel with the spec and into the run's folder.
    _rows: tuple[Row, ...] | None = PrivateAttr(default=None)

    @classmethod
    def from_rows(cls, rows: Any, **settings: Any) -> DataSpec:
        """A spec over rows that exist only in memory; `source` becomes their content hash.

        `rows` are dicts, a pandas DataFrame or a `datasets.Dataset`. Raises ValueError for anything else.
        """
        rows = tuple({str(name): value for name, value in row.items()} for row in _rows_of(rows))
        try:
            text = json.dumps(rows, sort_keys=True, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the rows cannot be written as JSON: {error}") from error
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        spec = cls(source=f"memory:{digest}", **settings)
        spec._rows = rows
        return spec

    @property
    def rows(self) -> tuple[Row, ...] | None:
        """The rows given in memory, or None where `source` names a place to read."""
        return self._rows


class TrainingSpec(_Part):
    """How the weights are changed. Names and meanings are those of transformers' TrainingArguments."""

    max_steps: int = _field(
        -1, help="Optimiser steps; -1 trains for num_train_epochs.", label="Steps", ge=-1, sweepable=True
    )
    num_train_epochs: float = _field(
        1.0, help="Passes over the training rows, where max_steps is -1.", label="Epochs", gt=0, sweepable=True
    )
    learning_rate: float = _field(2e-4, help="Peak learning rate.", gt=0, lt=1, sweepable=True)
    per_device_train_batch_size: int = _field(
        2, help="Rows (packed rows of max_length tokens) in one forward pass.", label="Batch size", ge=1, sweepable=True
    )
    gradient_accumulation_steps: int = _field(
        2, help="Forward passes per optimiser step.", label="Accumulation", ge=1, sweepable=True
    )
    max_length: int = _field(
        512, help="Longest row; longer examples are cut at the end.", unit="tokens", ge=8, sweepable=True
    )
    packing: bool = _field(
        True, help="Fill each row with several examples; each still sees only itself.", advanced=True
    )
    lr_scheduler_type: Scheduler = _field(
        "cosine", help="How the learning rate falls after the warm-up.", label="Schedule", sweepable=True
    )
    warmup_ratio: float = _field(
        0.05,
        help="Share of the steps in which the learning rate rises from zero.",
        ge=0,
        lt=1,
        advanced=True,
        sweepable=True,
    )
    optim: Optimiser = _field(
        "adamw_torch_fused",
        help="AdamW, with its averages in 32 bits, in 8 (bitsandbytes), or paged out of a full GPU; or LoRA-FA, which"
        " trains only LoRA's B.",
        label="Optimiser",
        advanced=True,
    )
    loraplus_lr_ratio: float | None = _field(
        None,
        help="LoRA+: LoRA's B learns so many times as fast as its A, such as 16; none trains both alike.",
        label="LoRA+ ratio",
        gt=0,
        advanced=True,
        sweepable=True,
    )
    weight_decay: float = _field(0.0, help="AdamW weight decay.", ge=0, lt=1, advanced=True, sweepable=True)
    label_smoothing_factor: float = _field(
        0.0,
        help="Share of each target given to all words alike; only in training: the held-out loss stays the plain one.",
        label="Label smoothing",
        ge=0,
        lt=1,
        advanced=True,
        sweepable=True,
    )
    max_grad_norm: float = _field(1.0, help="Clip the gradient's norm to this; 0 does not clip.", ge=0, advanced=True)
    adam_beta1: float = _field(0.9, help="AdamW: decay of the gradient average.", ge=0, lt=1, advanced=True)
    adam_beta2: float = _field(0.999, help="AdamW: decay of the squared-gradient average.", ge=0, lt=1, advanced=True)
    adam_epsilon: float = _field(1e-8, help="AdamW: added to the denominator.", gt=0, advanced=True)
    gradient_checkpointing: Literal["auto", True, False] = _field(
        "auto",
        help="Recompute activations in the backward pass: less memory, up to a third slower; auto does so for as many"
        " layers as the memory calls for, and none where it does not.",
        advanced=True,
    )
    activation_offloading: bool = _field(
        False,
        help="Keep what gradient checkpointing keeps in the host's memory instead of the GPU's; the copies overlap.",
        advanced=True,
    )
    torch_compile: bool = _field(
        False,
        help="Compile the model's blocks before the first step: takes minutes, which a long run gets back.",
        advanced=True,
    )
    num_processes: int = _field(
        1,
        help="Processes that share the work of a step, one per GPU. A step has as many rows as with one, so the result"
        " is the same.",
        label="Processes",
        ge=1,
        advanced=True,
    )
    sharding: Literal["auto", "none", "full"] = _field(
        "auto",
        help="What each of several processes keeps: all weights (none), or its share of them (full: FSDP2); auto shares"
        " them where every weight is trained, or where they do not fit otherwise.",
        advanced=True,
    )
    eval_steps: int = _field(
        20, help="Measure the held-out loss every so many steps; 0 only before and after.", unit="steps", ge=0
    )
    eval_samples: int = _field(
        3,
        help="Held-out questions that the model answers at each evaluation, to be read beside the charts; 0 for none.",
        label="Samples",
        unit="questions",
        ge=0,
        le=16,
    )
    sample_prompts: list[str] | None = _field(
        None, help="Questions of your own that it answers at each evaluation too.", advanced=True
    )
    save_steps: int = _field(
        20, help="Write a checkpoint every so many steps; 0 only at the end.", unit="steps", ge=0, advanced=True
    )
    save_total_limit: int = _field(2, help="Checkpoints to keep.", ge=1, advanced=True)
    seed: int = _field(
        0, help="Seed of the adapter's first weights, of dropout and of the order of rows.", ge=0, sweepable=True
    )

    @field_validator("optim", mode="before")
    @classmethod
    def _optim(cls, value: Any) -> Any:
        return "adamw_8bit" if value == "adamw_bnb_8bit" else value  # transformers' two names of one optimiser

    def optimizer_bytes(self, sizes: Iterable[int], device_type: str) -> int:
        """Bytes of the optimiser's averages on the device, for trained tensors of these numbers of elements.

        The averages of 8-bit AdamW are bytes with an fp32 scale per 256 of them, but fp32 in tensors under 4,096
        elements. Paged ones of 100,000 elements and more lie outside what torch allocates, on a GPU.
        """

        def of(size: int) -> int:
            if self.optim.startswith("paged") and device_type == "cuda" and size >= 100_000:
                return 0
            eight = self.optim.endswith("8bit") and size >= 4096
            return 2 * (size + 4 * -(-size // 256)) if eight else 8 * size

        return sum(map(of, sizes))


class TrackingSpec(_Part):
    """Where the run is recorded besides its own folder."""

    mlflow: bool = _field(True, help="Log the run to MLflow.", label="MLflow", advanced=True)
    tracking_uri: str | None = _field(
        None, help="MLflow tracking URI; none is a SQLite file in the runs folder.", label="MLflow URI", advanced=True
    )
    experiment: str = _field("nbtune", help="MLflow experiment.", min_length=1, advanced=True)


class RunSpec(_Part):
    """One run. A string, a dict or an object stands for a part: `RunSpec(model="...", data=rows, method="full")`.

    A method that is given by name, in a dict or not at all adapts all linear layers; a config object is taken as it is.
    """

    model: ModelSpec = Field(default_factory=ModelSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    method: PeftConfig | Literal["full"] = Field(default_factory=lambda: _method_of({}))
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        return {"name": str(value)} if isinstance(value, str | Path) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return {"source": str(value)}
        if isinstance(value, DataSpec | Mapping):
            return value
        return DataSpec.from_rows(value)

    @field_validator("method", mode="plain")
    @classmethod
    def _method(cls, value: Any) -> PeftConfig | Literal["full"]:
        if isinstance(value, PeftConfig):
            return value
        if value == "full":
            return "full"
        if isinstance(value, str):
            return _method_of({"peft_type": value})
        if isinstance(value, Mapping):
            return _method_of(value)
        raise ValueError(f"method is {value!r}; give a config such as LoraConfig(r=16), its name, a dict, or 'full'")

    @field_serializer("method")
    def _dump_method(self, value: PeftConfig | Literal["full"]) -> Any:
        return value if value == "full" else value.to_dict()

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if self.training.max_steps == 0:
            raise ValueError("training.max_steps is 0; give the number of steps, or -1 for whole epochs")
        if self.method == "full" and self.model.quantised_bytes is not None:
            raise ValueError("method is full, which cannot train quantised weights (model.load_in_4bit, load_in_8bit)")
        fast, only_b = self.training.loraplus_lr_ratio is not None, self.training.optim == "lorafa"
        if fast and (only_b or self.method == "full"):
            raise ValueError("training.loraplus_lr_ratio is for adapters, and not together with optim lorafa")
        if only_b and self.method_name != "lora":
            raise ValueError(f"training.optim is lorafa, which trains LORA; method is {self.method_name}")
        return self

    @property
    def method_name(self) -> str:
        """`"full"` or the lower-case peft type, for names and labels."""
        return "full" if self.method == "full" else self.method.peft_type.lower()

    @property
    def virtual_tokens(self) -> int:
        """How many tokens of a trained prompt stand before each example."""
        return self.method.num_virtual_tokens if isinstance(self.method, PromptLearningConfig) else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what YAML, JSON and papermill can carry."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """Raises SpecError that names each setting that is wrong."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            wrong = "\n".join(map(_wrong, error.errors()))
            raise SpecError("These settings cannot be used", wrong) from error

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunSpec:
        """Read a spec file. Raises SpecError naming the file and what is wrong in it."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError("The spec cannot be read", f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise SpecError("The spec is not YAML", f"{path}: {error}") from error
        if not isinstance(values, Mapping):
            raise SpecError(
                "The spec holds no settings", str(path), "Give it `model:`, `data:`, `method:` or `training:`."
            )
        return cls.from_dict(values)

    def updated(self, **changes: Any) -> RunSpec:
        """A copy with settings changed by name: `spec.updated(learning_rate=1e-4, r=8)` or `{"training.seed": 1}`.

        Short names are those of `settings`; one that two parts share must be given in full. `data` and `method` are the
        whole part, as `RunSpec` takes it. Raises SpecError for an unknown or ambiguous name.
        """
        whole = {part: changes.pop(part) for part in ("data", "method") if part in changes}
        if whole:
            return self._with_rows(RunSpec.from_dict({**self.to_dict(), **whole})).updated(**changes)
        values = self.to_dict()
        for name, value in changes.items():
            part, key = _resolve(name, self.method).split(".", 1)
            if not isinstance(values[part], dict):
                raise SpecError(f"{name!r} is a setting of an adapter, but method is {values[part]!r}")
            values[part][key] = value
        return self._with_rows(RunSpec.from_dict(values))

    def _with_rows(self, other: RunSpec) -> RunSpec:
        """Another spec with this one's rows in memory, where it names them."""
        if other.data.rows is None and other.data.source == self.data.source:
            other.data._rows = self.data._rows
        return other

    def preset(self, name: str) -> RunSpec:
        """A copy with the settings of a preset of `nbtune.presets`. Raises SpecError for an unknown one."""
        if name not in PRESETS:
            raise SpecError(f"There is no preset {name!r}", "", f"There are {', '.join(PRESETS)}.")
        return self.updated(**PRESETS[name].changes(self.method_name))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting as a form, a flag or a table row needs it."""

    path: str  # "training.learning_rate"
    type: Any
    default: Any
    help: str
    label: str
    unit: str | None = None
    choices: tuple[Any, ...] | None = None
    pattern: str | None = None  # a regular expression of values that are allowed beside the choices
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    advanced: bool = False
    sweepable: bool = False

    @property
    def part(self) -> str:
        return self.path.split(".", 1)[0]

    @property
    def name(self) -> str:
        return self.path.split(".", 1)[1]


def settings(method: PeftConfig | type[PeftConfig] | Literal["full"] = LoraConfig) -> list[Setting]:
    """Every setting of a run with this method, in the order in which a form shows them."""
    parts = [("model", ModelSpec), ("data", DataSpec), ("training", TrainingSpec), ("tracking", TrackingSpec)]
    found = [setting for part, cls in parts for setting in model_settings(part, cls)]
    if method != "full":
        found += _config_settings(method if isinstance(method, type) else type(method))
    return found


def model_settings(part: str, cls: type[BaseModel]) -> Iterator[Setting]:
    """The fields of a pydantic model as settings of `part`; the default of one that must be given is None."""
    hints = typing.get_type_hints(cls)
    for name, info in cls.model_fields.items():
        extra = typing.cast("dict[str, Any]", info.json_schema_extra or {})
        limits = {key: getattr(m, key) for m in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(m, key)}
        yield Setting(
            path=f"{part}.{name}",
            type=hints[name],
            default=None if info.is_required() else info.default,
            help=info.description or "",
            label=extra.get("label") or _label(name),
            unit=extra.get("unit"),
            choices=typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Literal else None,
            advanced=extra.get("advanced", False),
            sweepable=extra.get("sweepable", False),
            **limits,
        )


def _config_settings(cls: type[PeftConfig]) -> Iterator[Setting]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:  # identity of the file (peft_type, task_type, ...), not a choice
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name == "target_modules" and _adapts_linears(cls):
            default = "all-linear"
        yield Setting(
            path=f"method.{field.name}",
            type=hints[field.name],
            default=default,
            **{"label": _label(field.name), **field.metadata},
        )


def method_label(method: Mapping[str, Any]) -> str:
    """`LoRA r16`, `OFT`, `Prompt tuning, 20 tokens`: a method and its size, from the dict of its config."""
    kind = str(method.get("peft_type", "adapter"))
    label = PeftType(kind).label if kind in list(PeftType) else kind
    if "num_virtual_tokens" in method:
        return f"{label}, {method['num_virtual_tokens']} tokens"
    rank = method.get("target_r") or method.get("r")  # AdaLoRA's rank at the end; OFT's r is 0
    return f"{label} r{rank}" if rank else label


def _method_of(values: Mapping[str, Any]) -> PeftConfig:
    """The method that a run's settings mean: LoRA if none is named, on all linear layers if no targets are."""
    values = {"peft_type": "LORA", **values}
    if _adapts_linears(config_class(values["peft_type"])) and not values.get("target_parameters"):
        values = {"target_modules": "all-linear", **values}
    return PeftConfig.from_dict(values)


def _adapts_linears(cls: type[PeftConfig]) -> bool:
    return issubclass(cls, LayerConfig) and cls.peft_type not in _OWN_TARGETS


def _wrong(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in a line; one that concerns several fields has no place."""
    return f"{'.'.join(map(str, error['loc']))} = {error['input']!r}: {error['msg']}" if error["loc"] else error["msg"]


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _resolve(name: str, method: PeftConfig | Literal["full"]) -> str:
    """The full path of a setting given by its short or its full name."""
    known = [setting.path for setting in settings(method if method != "full" else LoraConfig)]
    if name in known:
        return name
    matches = [path for path in known if path.split(".", 1)[1] == name]
    if name == "seed":  # the seed of the run, as every trainer means it; `data.seed` only splits the rows
        return "training.seed"
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SpecError(f"The setting {name!r} is ambiguous", "", f"Write {' or '.join(matches)}.")
    near = difflib.get_close_matches(name, [path.split(".", 1)[1] for path in known], n=3)
    raise SpecError(f"There is no setting {name!r}", "", f"Did you mean {', '.join(near)}?" if near else "")


def _rows_of(value: Any) -> list[Row]:
    """Rows of a list of dicts, a pandas DataFrame or a `datasets.Dataset`."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # DataFrame, without importing pandas
        if not value.columns.is_unique:
            raise ValueError(f"the DataFrame has two columns {value.columns[value.columns.duplicated()][0]!r}")
        return typing.cast("list[Row]", value.to_dict(orient="records"))
    if hasattr(value, "to_list") and hasattr(value, "column_names"):  # datasets.Dataset, without importing datasets
        return typing.cast("list[Row]", value.to_list())
    if isinstance(value, Sequence) and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]
    raise ValueError(
        f"data is a {type(value).__name__}; give a path, a name, a list of dicts, a DataFrame or a Dataset"
    )
