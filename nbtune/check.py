"""check(spec): what would go wrong, and the remedy, before anything starts.

for problem in nt.check(spec):
print(problem)
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nbtune._processes import cores
from nbtune.errors import AdapterError, ModelError, NbtuneError, RunError
from nbtune.peft.config import LayerConfig, PeftConfig
from nbtune.peft.configs.lora import AdaLoraConfig, LoraConfig
from nbtune.peft.configs.vectors import TrainableTokensConfig
from nbtune.plan import SHARDED_OPTIMISERS, Plan, format_bytes, plan, shardings
from nbtune.recipe import Length
from nbtune.spec import RunSpec, method_label, settings

if TYPE_CHECKING:
    from nbtune.models import ModelInfo

Severity = Literal["error", "warning"]
SHORTEST = 64  # tokens: nobody is told to train on shorter rows


@dataclass(frozen=True)
class Remedy:
    """What would mend a problem: settings by path, as `RunSpec.updated` takes them."""

    label: str  # as on a button: "use 4-bit"
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: the run would fail) or unwise (`warning`)."""

    title: str
    message: str = ""
    remedy: str = ""
    severity: Severity = "error"
    setting: str | None = None  # the path of the setting to change, as in `settings`
    remedies: tuple[Remedy, ...] = ()  # the cheapest first; each would do by itself

    def __str__(self) -> str:
        return "\n".join(part for part in (f"{self.severity}: {self.title}", self.message, self.remedy) if part)


def check(spec: RunSpec, *, runs_dir: str | Path | None = None) -> list[Problem]:
    """Every problem that can be seen without loading the weights; an empty list where there is none.

    Reads the model's config and the data, and asks the tracking server, so it can take some seconds.

    Args:
        spec: The run to be.
        runs_dir: Where its folder would be made; None leaves that unchecked.
    """
    looks: list[Callable[[], Iterator[Problem]]] = [
        lambda: _runs_dir(runs_dir),
        lambda: _tracking(spec, runs_dir),
        lambda: _machine(spec),
        lambda: _processes(spec),
        lambda: _data(spec),
        lambda: _model(spec),
    ]
    return [problem for look in looks for problem in look()]


def require(spec: RunSpec, *, runs_dir: str | Path | None = None) -> None:
    """Raise NbtuneError with the first error that `check` finds, and name the others."""
    errors = [problem for problem in check(spec, runs_dir=runs_dir) if problem.severity == "error"]
    if errors:
        first, others = errors[0], errors[1:]
        also = [f"Also: {problem.title}. {problem.remedy}".rstrip() for problem in others]
        raise NbtuneError(
            first.title, "\n".join([part for part in (first.message, first.remedy) if part]), "\n".join(also)
        )


def _problem(error: NbtuneError, setting: str | None, *remedies: Remedy) -> Problem:
    return Problem(error.title, error.message, error.remedy, setting=setting, remedies=remedies)


def _runs_dir(runs_dir: str | Path | None) -> Iterator[Problem]:
    if runs_dir is None:
        return
    folder = Path(runs_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        yield Problem(
            "The runs folder cannot be written to",
            f"{folder}: {error.strerror}",
            "Choose another with --runs-dir, runs_dir=... or the environment variable NBTUNE_RUNS.",
        )


def _tracking(spec: RunSpec, runs_dir: str | Path | None) -> Iterator[Problem]:
    if not spec.tracking.mlflow:
        return
    from nbtune.store import require_reachable, tracking_uri

    try:
        require_reachable(tracking_uri(spec.tracking, Path(runs_dir or ".")))
    except RunError as error:
        remedies = [Remedy("do without MLflow", {"tracking.mlflow": False})]
        if spec.tracking.tracking_uri is not None:
            remedies.insert(0, Remedy("use a file in the runs folder", {"tracking.tracking_uri": None}))
        yield _problem(error, "tracking.tracking_uri", *remedies)


def _machine(spec: RunSpec) -> Iterator[Problem]:
    """Settings that want something of the machine, and of each other."""
    from nbtune.models import default_device, missing_compiler

    training, device = spec.training, default_device()
    uncompiled = Remedy("do not compile", {"training.torch_compile": False})
    kept_here = Remedy("do not offload", {"training.activation_offloading": False})
    if training.torch_compile and (missing := missing_compiler(device)):
        yield Problem(
            "This machine cannot compile the model",
            f"training.torch_compile is set, and {missing} is not there.",
            "Install it, or set torch_compile to false.",
            setting="training.torch_compile",
            remedies=(uncompiled,),
        )
    if training.torch_compile and training.activation_offloading:
        yield Problem(
            "torch_compile and activation_offloading do not go together",
            "Blocks that are checkpointed, whose inputs would be offloaded, are not compiled.",
            "Set one of the two.",
            setting="training.torch_compile",
            remedies=(uncompiled, kept_here),
        )
    elif training.torch_compile and training.gradient_checkpointing is True:
        yield Problem(
            "torch_compile would do nothing",
            "training.gradient_checkpointing is true, and blocks that are checkpointed are not compiled.",
            "Set one of the two.",
            severity="warning",
            setting="training.torch_compile",
            remedies=(uncompiled, Remedy("keep activations", {"training.gradient_checkpointing": "auto"})),
        )
    if training.activation_offloading and not training.gradient_checkpointing:
        yield Problem(
            "activation_offloading would do nothing",
            "It moves what gradient checkpointing keeps, and training.gradient_checkpointing is false.",
            "Set gradient_checkpointing to true.",
            severity="warning",
            setting="training.activation_offloading",
            remedies=(Remedy("compute layers again", {"training.gradient_checkpointing": True}), kept_here),
        )
    if device.type == "cpu" and training.activation_offloading:
        yield Problem(
            "activation_offloading needs a GPU",
            "There is none here: what would be moved to the host's memory is there already.",
            severity="warning",
            setting="training.activation_offloading",
            remedies=(kept_here,),
        )
    if device.type == "cpu" and training.optim.startswith("paged"):
        unpaged = training.optim.removeprefix("paged_").replace("adamw_32bit", "adamw_torch_fused")
        yield Problem(
            "Paging needs a GPU",
            f"There is none here: training.optim {training.optim} keeps its averages in the host's memory anyway.",
            f"Set optim to {unpaged}.",
            severity="warning",
            setting="training.optim",
            remedies=(Remedy(f"use {unpaged}", {"training.optim": unpaged}),),
        )


def _processes(spec: RunSpec) -> Iterator[Problem]:
    """What keeps several processes from sharing the run."""
    from nbtune.models import default_device

    training, device = spec.training, default_device().type
    count = training.num_processes
    if count == 1:
        return
    one = Remedy("use one process", {"training.num_processes": 1})
    there, kind = _places(device)
    if count > there:
        fewer = Remedy(f"use {there}", {"training.num_processes": there})
        yield Problem(
            f"There are no {count} {kind} for {count} processes",
            f"training.num_processes is {count}; this machine has {there} that this process may use.",
            f"Set num_processes to {there}.",
            setting="training.num_processes",
            remedies=(fewer,),
        )
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if rows % count:
        more = -(-rows // count) * count
        steps = -(-more // training.per_device_train_batch_size)
        while steps * training.per_device_train_batch_size % count:
            steps += 1
        remedy = Remedy(f"accumulate {steps}", {"training.gradient_accumulation_steps": steps})
        yield Problem(
            f"{rows} rows a step cannot be shared evenly by {count} processes",
            f"A step has {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} rows"
            " (per_device_train_batch_size x gradient_accumulation_steps), whatever the number of processes.",
            f"Set gradient_accumulation_steps to {steps}.",
            severity="error" if rows < count else "warning",
            setting="training.gradient_accumulation_steps",
            remedies=(remedy, one),
        )
    if not any(shardings(spec)):
        return
    whole = Remedy("do not shard", {"training.sharding": "none"})
    if training.torch_compile:
        yield Problem(
            "torch_compile and sharded weights do not go together",
            "training.torch_compile is set, and the weights are shared out over the processes.",
            "Set torch_compile to false, or sharding to none.",
            severity="error" if all(shardings(spec)) else "warning",
            setting="training.torch_compile",
            remedies=(Remedy("do not compile", {"training.torch_compile": False}), whole),
        )
    if training.sharding == "full" and spec.model.quantised_bytes is not None:
        yield Problem(
            "Quantised weights cannot be sharded",
            "training.sharding is full, and the model is loaded in 4 or 8 bits.",
            "Set sharding to none: each process then keeps the quantised model, which is small.",
            setting="training.sharding",
            remedies=(whole, Remedy("use 16-bit", {"model.load_in_4bit": False, "model.load_in_8bit": False})),
        )
    if spec.method == "full" and training.optim not in SHARDED_OPTIMISERS:
        yield Problem(
            f"{training.optim} cannot train sharded weights",
            "training.sharding is full.",
            "Set optim to adamw_torch_fused, or sharding to none.",
            setting="training.optim",
            remedies=(Remedy("use AdamW in 32 bits", {"training.optim": "adamw_torch_fused"}), whole),
        )


def _places(device_type: str) -> tuple[int, str]:
    """How many processes this machine has a place for, and what it has for each."""
    if device_type == "cpu":
        return cores(), "cores"
    import torch

    return torch.cuda.device_count(), "GPUs"


def _data(spec: RunSpec) -> Iterator[Problem]:
    from nbtune.data import read_rows
    from nbtune.models import load_tokenizer

    try:
        counts_tokens = any(isinstance(step, Length) and step.unit == "tokens" for step in spec.data.recipe)
        read_rows(spec.data, tokenizer=load_tokenizer(spec.model) if counts_tokens else None)
    except ModelError:
        return  # said of the model
    except NbtuneError as error:
        yield _problem(error, "data.source")


def _model(spec: RunSpec) -> Iterator[Problem]:
    from nbtune.models import describe

    try:
        info = describe(spec.model)
    except NbtuneError as error:
        yield _problem(error, "model.name")
        return

    yield from _context(spec, info)
    yield from _quantisation(spec, info)
    yield from _method(spec)


def _context(spec: RunSpec, info: ModelInfo) -> Iterator[Problem]:
    context, prompt = info.context_length, spec.virtual_tokens
    if context is not None and spec.training.max_length + prompt > context:
        before = f", and {prompt} virtual tokens come before each example" if prompt else ""
        yield Problem(
            f"max_length is longer than the model's context of {context} tokens",
            f"training.max_length is {spec.training.max_length}{before}.",
            f"Set max_length to {context - prompt} or less.",
            setting="training.max_length",
            remedies=(_shorter(context - prompt),) if context - prompt >= SHORTEST else (),
        )


def _quantisation(spec: RunSpec, info: ModelInfo) -> Iterator[Problem]:
    from nbtune.models import default_device

    if not spec.model.load_in_4bit or default_device().type != "cpu":
        return
    from nbtune.models.loader import check_rows

    try:
        for module in info.modules:
            if module.layer is not None:
                check_rows(info.source, module.name, module.in_features)
    except ModelError as error:
        in_8_bits = {"model.load_in_4bit": False, "model.load_in_8bit": True}
        in_16_bits = {"model.load_in_4bit": False, "model.load_in_8bit": False}
        remedies = Remedy("use 8-bit", in_8_bits), Remedy("use 16-bit", in_16_bits)
        yield _problem(error, "model.load_in_4bit", *remedies)


def _method(spec: RunSpec) -> Iterator[Problem]:
    """What the method's settings do to the model, seen by giving its skeleton the adapter."""
    try:
        _require_what_a_run_has(spec)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            planned = plan(spec)
    except AdapterError as error:
        setting = setting_of(f"{error.title} {error.message}", spec.method)
        yield _problem(error, setting, *_of_method(spec, setting))
        return
    except ModelError as error:  # an architecture that cannot be trained
        yield _problem(error, "model.name")
        return
    if told:
        text = "\n".join(dict.fromkeys(str(warning.message) for warning in told))  # many layers say the same
        yield Problem("The method would warn", text, severity="warning", setting=setting_of(text, spec.method))
    if not planned.trained_parameters:
        yield Problem(
            "Nothing would be trained",
            f"With these settings {method_label(spec.to_dict()['method'])} has no parameter to train.",
            "Name the tokens in token_indices." if isinstance(spec.method, TrainableTokensConfig) else "Change them.",
            setting="method.token_indices" if isinstance(spec.method, TrainableTokensConfig) else None,
        )
    if not planned.fits:
        yield _too_large(spec, planned)


def _too_large(spec: RunSpec, planned: Plan) -> Problem:
    """The problem of a run that does not fit, with the changes that would make it fit."""
    needed, available = format_bytes(planned.peak_bytes), format_bytes(planned.available_bytes)
    largest = max(planned.parts, key=lambda part: planned.parts[part])
    chosen = f" That is with {planned.chosen}." if planned.chosen else ""
    return Problem(
        "The run may need more memory than there is",
        f"About {needed} are needed and {available} are there for this process.{chosen}"
        f" The largest part is {largest}, {format_bytes(planned.parts[largest])}.",
        "Lower max_length, load the model in 4 bits, or choose a smaller one."
        if spec.training.gradient_checkpointing == "auto"
        else "Set gradient_checkpointing to auto, or lower max_length.",
        severity="warning",
        setting="training.max_length",
        remedies=tuple(_smaller(spec, planned.available_bytes)),
    )


def _smaller(spec: RunSpec, available: int) -> Iterator[Remedy]:
    """Changes of one kind each, the cheapest first, with which the run fits; all of them together if none does."""
    together: dict[str, Any] = {}
    found = False
    for remedy in _savings(spec):
        together |= remedy.changes
        planned = plan(spec.updated(**remedy.changes), available_bytes=available)
        if planned.fits:
            found = True
            yield Remedy(f"{remedy.label} ({format_bytes(planned.peak_bytes)})", remedy.changes)
    if found or not together:
        return
    planned = plan(spec.updated(**together), available_bytes=available)
    if planned.fits:
        yield Remedy(f"save all that can be saved ({format_bytes(planned.peak_bytes)})", together)


def _savings(spec: RunSpec) -> Iterator[Remedy]:
    """What takes less memory, from what costs least in speed and quality on."""
    training = spec.training
    if training.gradient_checkpointing is False:
        yield Remedy("compute layers again", {"training.gradient_checkpointing": "auto"})
    if training.optim == "adamw_torch_fused":
        yield Remedy("use 8-bit AdamW", {"training.optim": "adamw_8bit"})
    if spec.method != "full" and not spec.model.load_in_4bit:
        yield Remedy("use 4-bit", {"model.load_in_4bit": True, "model.load_in_8bit": False})
    if spec.method == "full":
        yield Remedy("use LoRA", {"method": "lora"})
    if training.max_length // 2 >= SHORTEST:
        yield _shorter(training.max_length // 2)


def _shorter(length: int) -> Remedy:
    return Remedy(f"shorten to {length:,}", {"training.max_length": length})


def _of_method(spec: RunSpec, setting: str | None) -> list[Remedy]:
    """What would mend an error of the method that is about this setting."""
    values = spec.to_dict()["method"]
    if setting == "method.target_modules" and values["target_modules"] != "all-linear":
        return [Remedy("adapt all linear layers", {"method.target_modules": "all-linear"})]
    if setting == "method.init_lora_weights":
        return [Remedy("use the usual first weights", {"method.init_lora_weights": True})]
    if setting in ("method.rank_pattern", "method.alpha_pattern"):
        return [Remedy("one for all modules", {setting: {}})]
    return []


def _require_what_a_run_has(spec: RunSpec) -> None:
    """Raise AdapterError where the method wants what is not there in a run, or is there only when it trains."""
    method, steps = spec.method, spec.training.max_steps
    if isinstance(method, AdaLoraConfig) and method.total_step is None and steps > 0:
        method.replace(total_step=steps)
    if not isinstance(method, LoraConfig):
        return
    if method.init_lora_weights == "eva":
        raise AdapterError(
            "A run has no EVA",
            "init_lora_weights is eva, which starts from inputs of the layers, and a run does not collect them.",
            "Choose another init_lora_weights, or call initialize_lora_eva_weights in a loop of your own.",
        )
    if method.init_lora_weights == "loftq" and spec.model.quantised_bytes is not None:
        raise AdapterError(
            "LoftQ needs the original weights",
            "init_lora_weights is loftq, and the model is loaded in 4 or 8 bits already.",
            "Choose another init_lora_weights, or load the model in 16 bits.",
        )


def setting_of(text: str, method: PeftConfig | Literal["full"]) -> str | None:
    """The path of the method's setting that a text names first; of the modules to adapt, if it names none."""
    words = re.findall(r"\w+", text)
    named = {setting.name: setting.path for setting in settings(method) if setting.part == "method"}
    modules = "method.target_modules" if isinstance(method, LayerConfig) else None
    return next((named[word] for word in words if word in named), modules)
