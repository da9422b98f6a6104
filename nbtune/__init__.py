"""nbtune: fine-tune language models from a living notebook.

import nbtune as nt
run = nt.train(nt.RunSpec(model="smollm2-135m-instruct", data="stdlib-docs", method={"r": 16}))
run.watch()
nt.arena("base", run)
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbtune.check import Problem, check
    from nbtune.compare.arena import arena
    from nbtune.compare.promptset import evaluate
    from nbtune.compare.routing import router
    from nbtune.errors import NbtuneError
    from nbtune.export import export
    from nbtune.infer.ask import ask
    from nbtune.infer.server import serve
    from nbtune.peft.config import PeftConfig
    from nbtune.peft.configs.lora import LoraConfig
    from nbtune.plan import Plan, plan
    from nbtune.run import Run, runs, train
    from nbtune.spec import DataSpec, ModelSpec, RunSpec, TrackingSpec, TrainingSpec, settings
    from nbtune.sweep.halving import Halving
    from nbtune.sweep.space import Range
    from nbtune.sweep.sweep import Sweep, sweep
    from nbtune.together import train_together

__version__ = "0.1.0"

# On a CPU oneDNN keeps the program that it compiles for each shape of a product (0.4 MB), 1,024 of them, and torch's
# binding as many: rows of ever new lengths would fill both. They are read when a process computes its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# Imported when first used: torch, gradio and mlflow take seconds each.
_HOME = {
    "DataSpec": "nbtune.spec",
    "Halving": "nbtune.sweep.halving",
    "LoraConfig": "nbtune.peft.configs.lora",
    "ModelSpec": "nbtune.spec",
    "NbtuneError": "nbtune.errors",
    "PeftConfig": "nbtune.peft.config",
    "Plan": "nbtune.plan",
    "Problem": "nbtune.check",
    "Range": "nbtune.sweep.space",
    "Run": "nbtune.run",
    "RunSpec": "nbtune.spec",
    "Sweep": "nbtune.sweep.sweep",
    "TrackingSpec": "nbtune.spec",
    "TrainingSpec": "nbtune.spec",
    "arena": "nbtune.compare.arena",
    "ask": "nbtune.infer.ask",
    "check": "nbtune.check",
    "evaluate": "nbtune.compare.promptset",
    "export": "nbtune.export",
    "plan": "nbtune.plan",
    "router": "nbtune.compare.routing",
    "runs": "nbtune.run",
    "serve": "nbtune.infer.server",
    "settings": "nbtune.spec",
    "sweep": "nbtune.sweep.sweep",
    "train": "nbtune.run",
    "train_together": "nbtune.together",
}

__all__ = [
    "DataSpec",
    "Halving",
    "LoraConfig",
    "ModelSpec",
    "NbtuneError",
    "PeftConfig",
    "Plan",
    "Problem",
    "Range",
    "Run",
    "RunSpec",
    "Sweep",
    "TrackingSpec",
    "TrainingSpec",
    "arena",
    "ask",
    "check",
    "evaluate",
    "export",
    "plan",
    "router",
    "runs",
    "serve",
    "settings",
    "sweep",
    "train",
    "train_together",
    "wizard",
]


def wizard(**start_with: Any) -> Any:
    """Show the form that builds a `RunSpec`, starts it and compares what came out.

    Settings given here by name are filled in: `wizard(max_steps=20)`.
    """
    from nbtune_widgets import wizard as show

    return show(**start_with)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name.endswith("Config"):  # every method's settings: nt.IA3Config, nt.OFTConfig, ...
        peft = importlib.import_module("nbtune.peft")
        if name in peft.__all__:
            return getattr(peft, name)
    raise AttributeError(f"module 'nbtune' has no attribute {name!r}")


class _Face(ModuleType):
    """`nbtune.train` is the function although a folder bears its name: importing the folder must not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __dir__() -> list[str]:
    return sorted(__all__)
