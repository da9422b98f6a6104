"""Write docs/methods.md: every adapter method and what it can do, read from the code.

uv run python docs/methods.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from nbtune._transformers import Conv1D
from nbtune.modules.base import CONVOLUTIONS
from nbtune.peft.config import PeftType, config_class
from nbtune.peft.layer import Adapter
from nbtune.peft.methods import adapter_class
from nbtune.peft.prompt import Prompt

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# The adapter methods

Written by `docs/methods.py` from the code; the same facts are tests (`grid.py`, `test_peft_wrong_results.py`).
Configs, their settings and the files are those of `peft` 0.21, in both directions.

- **Layers**: what it adapts. *Linear* is `nn.Linear`, transformers' `Conv1D` and bitsandbytes' 4-bit and 8-bit layers.
- **Merge**: into the base weights, and out of them again bit for bit. Into a quantised layer: as a 16-bit layer (the
  default) or quantised again, with the error reported.
- **Rows**: another adapter for each row of a batch (`adapter_names`), computed together, in inference and training.
- **Quantised**: trains and serves on 4-bit and 8-bit base layers.
- **Weighted**: `add_weighted_adapter`.

| `peft_type` | config | layers | merge | rows | quantised | weighted | what it is |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(f"{_row(config_class(name))}\n" for name in PeftType)


def _row(config: type) -> str:
    kind = adapter_class(config())
    prompt = issubclass(kind, Prompt)
    linear = nn.Linear in kind.bases and not prompt
    cells = [
        f"`{config.peft_type}`",
        f"`{config.__name__}`",
        "a prompt before the text" if prompt else _layers(config, kind),
        "no" if prompt else "yes",
        "prompts of one length" if prompt else "yes",
        "yes" if linear or prompt or nn.Embedding in kind.bases else "-",
        "yes" if kind.weighted else "no",
        " ".join((sys.modules[kind.__module__].__doc__ or "").split("\n\n", 1)[0].split()),
    ]
    return f"| {' | '.join(cells)} |"


def _layers(config: type, kind: type[Adapter]) -> str:
    """The kinds of layers in words."""
    if config.peft_type == PeftType.TRAINABLE_TOKENS:
        return "Embedding, with the output head tied to it"
    if nn.Module in kind.bases:
        return "any, usually norms"
    names = ["Linear"] if nn.Linear in kind.bases else []
    convolutions = [base.__name__.removeprefix("Conv") for base in CONVOLUTIONS if base in kind.bases]
    names += [f"Conv {', '.join(convolutions)}"] if convolutions else []
    known = (nn.Linear, Conv1D, *CONVOLUTIONS)
    names += [base.__name__ for base in kind.bases if base not in known]
    return ", ".join(names) + (", experts" if kind.__name__ == "Lora" else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
