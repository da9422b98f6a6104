"""Adapter configs: PEFT's names, defaults and JSON, as frozen dataclasses that carry the metadata of a form.

Imports no torch, so that a spec can be read, checked and shown before anything heavy is loaded.

    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    PeftConfig.from_dict(config.to_dict()) == config
    PeftConfig.from_pretrained("runs/3/adapter")     # an instance of the class that `peft_type` names
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import typing
import warnings
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from nbtune import _files
from nbtune._hub import downloaded
from nbtune._settings import check, check_regex, detail, did_you_mean, invalid, plain, setting
from nbtune.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


class PeftType(StrEnum):
    """The methods that nbtune knows, under PEFT's names, each with its config: nbtune.peft.configs.<family>.<config>.

    Its adapter is in nbtune.peft.methods: the module has PEFT's name, the class that of the config without `Config`.
    """

    family: str
    config: str
    label: str  # as its paper writes it

    def __new__(cls, name: str, family: str, config: str, label: str) -> Self:
        member = str.__new__(cls, name)
        member._value_, member.family, member.config, member.label = name, family, config, label
        return member

    LORA = "LORA", "lora", "LoraConfig", "LoRA"
    ADALORA = "ADALORA", "lora", "AdaLoraConfig", "AdaLoRA"
    IA3 = "IA3", "vectors", "IA3Config", "IA3"
    LN_TUNING = "LN_TUNING", "vectors", "LNTuningConfig", "LN tuning"
    BEFT = "BEFT", "vectors", "BeftConfig", "BEFT"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS", "vectors", "TrainableTokensConfig", "Trainable tokens"
    OFT = "OFT", "rotations", "OFTConfig", "OFT"
    BOFT = "BOFT", "rotations", "BOFTConfig", "BOFT"
    HRA = "HRA", "rotations", "HRAConfig", "HRA"
    LOHA = "LOHA", "low_rank", "LoHaConfig", "LoHa"
    LOKR = "LOKR", "low_rank", "LoKrConfig", "LoKr"
    VERA = "VERA", "shared", "VeraConfig", "VeRA"
    RANDLORA = "RANDLORA", "shared", "RandLoraConfig", "RandLoRA"
    FOURIERFT = "FOURIERFT", "sparse", "FourierFTConfig", "FourierFT"
    WAVEFT = "WAVEFT", "sparse", "WaveFTConfig", "WaveFT"
    C3A = "C3A", "sparse", "C3AConfig", "C3A"
    VBLORA = "VBLORA", "shared", "VBLoRAConfig", "VB-LoRA"
    SHIRA = "SHIRA", "sparse", "ShiraConfig", "SHiRA"
    HIRA = "HIRA", "low_rank", "HiraConfig", "HiRA"
    MISS = "MISS", "low_rank", "MissConfig", "MiSS"
    GRALORA = "GRALORA", "low_rank", "GraloraConfig", "GraLoRA"
    ROAD = "ROAD", "rotations", "RoadConfig", "RoAd"
    DELORA = "DELORA", "low_rank", "DeloraConfig", "DeLoRA"
    PROMPT_TUNING = "PROMPT_TUNING", "prompts", "PromptTuningConfig", "Prompt tuning"
    PREFIX_TUNING = "PREFIX_TUNING", "prompts", "PrefixTuningConfig", "Prefix tuning"
    P_TUNING = "P_TUNING", "prompts", "PromptEncoderConfig", "P-tuning"


class TaskType(StrEnum):
    """PEFT's tasks. They are written to the file; of them nbtune itself only acts on the classification heads."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105  (a token of text)
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class PeftConfig:
    """What every adapter has. Raises AdapterError on construction for a value that cannot be right.

    A subclass is a frozen dataclass by itself: `class LoraConfig(BiasedConfig, peft_type="LORA")`.
    """

    peft_type: ClassVar[str] = ""
    absent: ClassVar[tuple[str, ...]] = ()  # settings that PEFT's config of this method does not have

    # Who the adapter is; no choices, so no help and no place in a form.
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # keys of a newer file, kept as they came
    modules_to_save: list[str] | None = detail(
        None, "Modules to train in full and save with the adapter, such as a new head.", label="Modules trained in full"
    )

    def __init_subclass__(cls, *, peft_type: str = "", absent: tuple[str, ...] = ()) -> None:
        super().__init_subclass__()
        cls.peft_type, cls.absent = peft_type or cls.peft_type, absent or cls.absent
        dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)

    def __new__(cls, *_args: Any, **settings: Any) -> Self:
        """Refuse a misspelt setting with the nearest names, where a dataclass would raise a bare TypeError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                message = f"{cls.__name__} has no setting {name!r}."
                raise AdapterError("Unknown setting", message, did_you_mean(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            check(type(self), field, value)
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise invalid("task_type", self.task_type, f"must be one of {', '.join(TaskType)}")

    def __repr__(self) -> str:
        """Show what differs from the defaults, as one would write it."""
        shown = [f"{name}={value!r}" for name, value in self.changes().items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def changes(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        default = type(self)()
        return {name: value for name, value in vars(self).items() if value != vars(default)[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The config that `peft_type` names, in any case; without one, a config of this class.

        A dict with a `peft_version` comes from a file, perhaps of a newer PEFT: keys that are unknown here are kept in
        `extra`, written back by `to_dict`, and warned about. In any other dict they are an AdapterError.
        """
        return cls._from_dict(values, from_file=bool(values.get("peft_version")))

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any], *, from_file: bool) -> PeftConfig:
        values = dict(values)
        values.pop("runtime_config", None)  # PEFT: how to run, never a part of the adapter
        kind = config_class(str(values.pop("peft_type", None) or cls.peft_type))
        if not issubclass(kind, cls):
            raise AdapterError("Another method", f"This is a {kind.peft_type} adapter, not {cls.peft_type}.")
        if from_file:
            known = {field.name for field in dataclasses.fields(kind)}
            extra = {name: values.pop(name) for name in sorted(values.keys() - known)}
            if extra:
                message = f"The adapter's config has settings unknown to this version of nbtune: {', '.join(extra)}. "
                warnings.warn(f"{message}They are kept in the config and have no effect.", stacklevel=4)
            values["extra"] = extra
        return kind(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the keys of PEFT's adapter_config.json."""
        values = dataclasses.asdict(self)
        extra = values.pop("extra")
        values = {name: value for name, value in values.items() if value is not None or name not in self.absent}
        return {"peft_type": self.peft_type, **values, **extra}

    def to_json(self) -> str:
        """The text of adapter_config.json. Patterns keep their order: the first that matches counts."""
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2) + "\n"

    def to_yaml(self) -> str:
        """The same as YAML, the settings in their own order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_json_file(cls, path: str | Path) -> PeftConfig:
        """Read an adapter_config.json, or a .yaml file. Raises AdapterError naming the file and what is wrong in it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(text) if str(path).endswith((".yaml", ".yml")) else json.loads(text)
        except (OSError, ValueError, yaml.YAMLError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise AdapterError("Unreadable adapter config", f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise AdapterError("Unreadable adapter config", f"{path} holds a {type(values).__name__}, not settings.")
        return cls._from_dict(values, from_file=True)

    from_yaml_file = from_json_file

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> PeftConfig:
        """The config in an adapter's folder or hub repository."""
        return cls.from_json_file(adapter_folder(path, revision) / CONFIG_NAME)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; a config itself never changes."""
        return dataclasses.replace(self, **changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json into the folder."""
        _files.write_text(Path(folder) / CONFIG_NAME, self.to_json())


class LayerConfig(PeftConfig):
    """What every method that adapts layers has: which modules. The matching rules are those of PEFT."""

    target_modules: list[str] | str | None = setting(
        None,
        "Modules to adapt: names (endings of module paths), a regular expression over whole paths, or all-linear "
        "(every linear layer but the output head). None: what PEFT adapts in such a model, or all of its blocks.",
    )
    exclude_modules: list[str] | str | None = detail(None, "Modules to leave alone, matched like target modules.")
    layers_to_transform: list[int] | int | None = detail(None, "Adapt only the blocks of these numbers, from 0.")
    layers_pattern: list[str] | str | None = detail(
        None, "Name of the list of blocks that layers_to_transform counts in, such as layers or h."
    )

    @property
    def trained_biases(self) -> str:
        """Which biases of the base model are trained: none, targets (of the adapted modules) or all."""
        return "none"

    @property
    def trained_tokens(self) -> list[int] | dict[str, list[int]] | None:
        """Tokens whose embeddings are trained: of the input embedding, or by the name of the embedding."""
        return None

    @property
    def adapted_parameters(self) -> list[str]:
        """Parameters that are adapted without being a module's weight: endings of their paths."""
        return []

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = self.target_modules
        if targets in ([], ""):
            raise invalid("target_modules", targets, "must name at least one module, or be None")
        check_regex("target_modules", targets)
        check_regex("exclude_modules", self.exclude_modules)
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else [self.layers_pattern]:
            check_regex("layers_pattern", pattern)
        for name in ("layers_to_transform", "layers_pattern"):
            if vars(self)[name] is not None and isinstance(targets, str) and targets.lower() != "all-linear":
                message = f"{name} is set, but target_modules is the text {targets!r}."
                remedy = "Give target_modules as a list, or put the layers in the regex."
                raise AdapterError(f"{name} needs names", message, remedy)
        if self.layers_pattern and self.layers_to_transform is None:
            message = "layers_pattern only says where layers_to_transform counts."
            raise AdapterError("layers_pattern is set alone", message)
        for name, patterns in self.patterns.items():
            for pattern, value in patterns.items():
                check_regex(name, pattern)
                if value <= 0:
                    raise invalid(f"{name}[{pattern!r}]", value, "must be more than 0")

    @property
    def patterns(self) -> dict[str, dict[str, Any]]:
        """The settings that give some modules another value, by name: {"rank_pattern": {"q_proj": 4}}."""
        values = vars(self).items()
        return {name: value for name, value in values if name.endswith("_pattern") and isinstance(value, dict)}


class BiasedConfig(LayerConfig):
    """Layer methods that can train the base model's biases too."""

    only: ClassVar[str] = ""  # PEFT's word for the biases of the adapted modules; "": <peft_type>_only

    bias: str = detail(
        "none",
        "Biases of the base model to train and save: none, those of the adapted modules (lora_only with LoRA), or all.",
        label="Biases",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        words = "none", "all", self.only or f"{self.peft_type.lower()}_only"
        if self.bias not in words:
            raise invalid("bias", self.bias, f"must be one of {', '.join(map(repr, words))}")

    @property
    def trained_biases(self) -> str:
        return {"none": "none", "all": "all"}.get(self.bias, "targets")


class PromptLearningConfig(PeftConfig):
    """Methods that train a prompt of virtual tokens; the model itself stays as it is."""

    num_virtual_tokens: int = setting(
        20, "Length of the trained prompt.", label="Virtual tokens", unit="tokens", ge=1, sweepable=True
    )
    # Facts of the base model, filled in when the adapter is made; PEFT reads them from the file.
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config class of a method, by PEFT's name of it in any case. Raises AdapterError for an unknown one."""
    if peft_type.upper() not in list(PeftType):
        message = f"peft_type is {peft_type!r}." if peft_type else "There is no peft_type."
        remedy = f"nbtune knows {', '.join(PeftType)}, and 'full' for a run that trains every weight."
        raise AdapterError("Unknown method", message, remedy)
    method = PeftType(peft_type.upper())
    return vars(importlib.import_module(f"nbtune.peft.configs.{method.family}"))[method.config]


def adapter_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: `path` itself, or the download of the hub repository `owner/name`.

    Raises AdapterError where there is neither, where the folder holds no adapter, or where its weights are a pickle.
    """
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        # Both weight files are asked for, so that a repository with only a pickle is told from one without weights.
        folder = downloaded(str(path), revision, [CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"])
    if not folder.is_dir():
        remedy = "Give the folder that save_pretrained wrote, or a hub id."
        raise AdapterError("No such adapter", f"{path} is no folder.", remedy)
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
        remedy = f"Adapters inside it: {', '.join(inside)}." if inside else ""
        raise AdapterError("Not an adapter", f"{folder} has no {CONFIG_NAME}.", remedy)
    return folder
