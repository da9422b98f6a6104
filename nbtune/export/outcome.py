"""What an export came to: where it is, how near it is to the original; and `export.json`, which says so beside it."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nbtune import _files
from nbtune.export.proof import Proof


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written, and how near it is to the adapter in memory."""

    path: Path
    format: str
    dtype: str | None
    source: str  # name of the run or the adapter
    base: str
    bytes: int
    computed_in: str  # precision of both sides of the proof
    proof: Proof
    # The same for the weights as they were rounded for block types, in memory: whether the file says what was meant.
    rounded: Proof | None = None
    # How far merging onto float weights is from the quantised ones that were trained on; none where they were floats.
    from_quantised: Proof | None = None
    same_tokens: bool | None = None  # whether a GGUF's tokenizer reads the prompts as the original does
    pushed_to: str | None = None  # the address on the hub

    @property
    def proved(self) -> bool:
        """Whether what was written answers as it should."""
        return self.proof.holds and (self.rounded is None or self.rounded.holds) and self.same_tokens is not False

    @property
    def report(self) -> Path:
        """Where this is stored."""
        return report_path(self.path)

    @property
    def loading(self) -> str:
        """Two lines of Python that load it elsewhere."""
        path = json.dumps(str(self.path), ensure_ascii=False)
        if self.format == "merged":
            return f'from transformers import pipeline\nchat = pipeline("text-generation", {path})'
        if self.format == "gguf":
            return f"from llama_cpp import Llama\nmodel = Llama({path})"
        if self.format == "gguf-lora":
            return f'from llama_cpp import Llama\nmodel = Llama("base.gguf", lora_path={path})'
        if "/" in self.base:  # a hub id, which peft can load
            return (
                f"from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained({path})"
            )
        return f'import nbtune as nt\nnt.arena("base", {path})'

    def __str__(self) -> str:
        text = f"{self.path}: {self.format}{f' {self.dtype}' if self.dtype else ''}, {self.bytes / 1e6:,.1f} MB\n"
        text += f"proof: {self.proof}"
        if self.rounded is not None:
            text += f"\nagainst the same weights rounded in memory: {self.rounded}"
        if self.from_quantised is not None:
            text += f"\nfrom the quantised base that it was trained on: {self.from_quantised}"
        return text


def report_path(out: Path) -> Path:
    """`export.json` in a folder; `NAME.export.json` beside a file."""
    return out / "export.json" if out.is_dir() else out.with_suffix(".export.json")


def store(done: Export) -> None:
    """Write what was found beside what was written."""
    values = dataclasses.asdict(done) | {
        "path": done.path.name,
        "proved": done.proved,
        "nbtune": version("nbtune"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _files.write_text(done.report, json.dumps(_without_infinities(values), indent=2) + "\n")


def _without_infinities(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
