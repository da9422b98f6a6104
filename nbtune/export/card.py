"""The model card of an export: what it was made of, from the run's own files."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from nbtune.export.precision import Precision
from nbtune.models.trained import Trained
from nbtune.spec import RunSpec

CARD = "README.md"
_METRICS = {
    "eval_loss_before": "held-out loss before (nats per token)",
    "eval_loss_after": "held-out loss after (nats per token)",
    "train_loss": "training loss",
    "steps": "optimiser steps",
    "train_seconds": "seconds of training",
}
_LOADING = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")""",
    "gguf": """from llama_cpp import Llama

model = Llama("path/to/this/file.gguf")""",
    "gguf-lora": """from llama_cpp import Llama

model = Llama("path/to/a/gguf/of/the/base.gguf", lora_path="path/to/this/file.gguf")""",
}
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp", "gguf-lora": "llama.cpp"}


def card(trained: Trained, format: str, precision: Precision | None) -> str:
    """The text of README.md: a head in YAML for hubs, then base, method, data, settings and metrics.

    Data, settings and metrics are those of the run that the weights lie in; a bare adapter has none.
    """
    base = public_name(trained.model.name)
    head: dict[str, Any] = {
        "library_name": _LIBRARIES[format],
        "pipeline_tag": "text-generation",
        "tags": ["nbtune", trained.label.split()[0].lower()],
    }
    if "/" in base:  # a hub id
        head = {"base_model": base, **head}
    kind = f"{trained.label} of {base}"
    text = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {trained.name}",
        "",
        f"{kind}, made with nbtune {version('nbtune')}."
        + (f" The weights are merged, in {precision.name}." if precision and format != "gguf-lora" else ""),
        "",
        "```python",
        _LOADING[format].format(base=base),
        "```",
        "",
        *_of_run(trained.folder.resolve().parent),
        "How near this is to the adapter in memory is in `export.json`.",
        "",
    ]
    return "\n".join(text)


def public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def _of_run(folder: Path) -> list[str]:
    """Data, metrics and settings, where the weights lie in a run."""
    if not (folder / "spec.yaml").is_file():
        return []
    spec = RunSpec.from_yaml(folder / "spec.yaml")
    text = ["## Data", "", f"`{public_name(spec.data.source)}`", ""]
    summary = folder / "summary.json"
    if summary.is_file():
        values = json.loads(summary.read_text(encoding="utf-8"))
        found = {label: values.get(key) for key, label in _METRICS.items() if values.get(key) is not None}
        rows = [f"| {label} | {value:.4g} |" for label, value in found.items()]
        text += ["## Metrics", "", "| | |", "|---|---|", *rows, ""]
    return [*text, "## Settings", "", "```yaml", _public_yaml(spec).strip(), "```", ""]


def _public_yaml(spec: RunSpec) -> str:
    """What was trained on what and how, without the folders of this machine and without the rows themselves."""
    values = {part: spec.to_dict()[part] for part in ("model", "data", "method", "training")}
    values["data"].pop("rows", None)
    return yaml.safe_dump(_public(values), sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
