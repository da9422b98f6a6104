"""Train several runs on one base model, in one process: their micro-batches go through the base together.

    runs = train_together([spec.updated(r=r) for r in (4, 8, 16)])
    for run in runs: run.wait()

Each run is what `nbtune.train` gives: its own folder, events, checkpoints and adapter, the same losses; it is stopped,
paused, watched and resumed by itself, resumed also alone. What the runs may differ in is `OWN`, what an adapter needs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

from nbtune._names import new_id
from nbtune.check import require
from nbtune.errors import RunError
from nbtune.models.trained import default_runs_dir
from nbtune.plan import format_bytes, plan
from nbtune.plan.together import plan_together
from nbtune.run import Run
from nbtune.shelf import difference
from nbtune.spec import RunSpec

# Settings of `training` that each run of a group may have for itself; its method and its tracking are its own anyway.
OWN = (
    "max_steps", "num_train_epochs", "learning_rate", "gradient_accumulation_steps", "lr_scheduler_type",
    "warmup_ratio", "optim", "loraplus_lr_ratio", "weight_decay", "label_smoothing_factor", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "eval_steps", "eval_samples", "sample_prompts", "save_steps",
    "save_total_limit", "seed",
)  # fmt: skip


def train_together(
    specs: Sequence[RunSpec], *, runs_dir: str | Path | None = None, run_ids: Sequence[str] | None = None
) -> list[Run]:
    """Start these runs on one base model and return them, in order; each as `nbtune.train` does.

    Args:
        specs: What to train. They differ in their methods and in `OWN`.
        runs_dir: The folder of runs; None is `default_runs_dir()`.
        run_ids: The names of the runs' folders; None chooses them.

    Raises NbtuneError, before anything is written, where runs cannot be trained together or would not fit.
    """
    runs = create_together(specs, runs_dir=runs_dir, run_ids=run_ids)
    go_on_together(runs)
    return runs


def create_together(
    specs: Sequence[RunSpec], *, runs_dir: str | Path | None = None, run_ids: Sequence[str] | None = None
) -> list[Run]:
    """The runs of `train_together`, which `go_on_together` is to start. Raises what that raises."""
    folder = (Path(runs_dir) if runs_dir is not None else default_runs_dir()).resolve()
    require_together(specs)
    require(specs[0], runs_dir=folder)  # of the others only the methods differ, which the plan looks at
    planned = plan_together(specs)
    whole = planned.whole
    if not whole.fits:
        raise RunError(
            f"{len(specs)} runs do not fit into memory together",
            f"They need {format_bytes(whole.peak_bytes)}, there are {format_bytes(whole.available_bytes)}.",
            "Train fewer together, or with smaller micro-batches.",
        )
    ids = run_ids if run_ids is not None else [None] * len(specs)
    return [Run._create(spec, folder, chosen or new_id(folder)) for spec, chosen in zip(specs, ids, strict=True)]


def go_on_together(runs: Sequence[Run]) -> None:
    """Begin, or resume from their checkpoints, runs that no thread trains."""
    from nbtune.train.together import Together

    together = Together({run.path: run.spec for run in runs})
    try:
        for run in runs:
            run._start(together.train_in_folder)
    except BaseException as error:
        together.give_up(error)
        raise
    threading.Thread(target=together.conduct, name=f"nbtune-together-{runs[0].id}", daemon=True).start()


def require_together(specs: Sequence[RunSpec]) -> None:
    """Raise RunError, naming what differs, where these runs cannot share a base model."""
    if not specs:
        raise RunError("There is nothing to train", "", "Give one spec or more.")
    for number, spec in enumerate(specs, 1):
        if (reason := why_alone(spec)) is not None:
            raise RunError(f"Run {number} has to be trained alone", reason, "Take it out of the group.")
    for number, spec in enumerate(specs[1:], 2):
        if base_of(spec) != base_of(specs[0]):
            names = [path for path in difference([_Has(specs[0]), _Has(spec)]) if not _is_own(path)]
            raise RunError(
                "These runs cannot share a base model",
                f"Run {number} differs from the first in {', '.join(names)}.",
                "Let them differ in their methods, learning rates, schedules and seeds only, or train them in groups.",
            )


def why_alone(spec: RunSpec) -> str | None:
    """Why a run can share its base model with no other; None where it can."""
    if spec.method == "full":
        return "It trains every weight, and would change the base of the others."
    if spec.training.num_processes > 1:
        return "It is trained by several processes (num_processes)."
    if spec.training.torch_compile:
        return "Its blocks are compiled (torch_compile), for its adapter only."
    if spec.training.activation_offloading:
        return "It offloads what is kept for the backward pass (activation_offloading), of all runs."
    return None


def base_of(spec: RunSpec) -> str:
    """The same for runs that can be trained together: model, data and the layout of micro-batches."""
    values = spec.to_dict()
    training = {name: value for name, value in values["training"].items() if name not in OWN}
    return json.dumps([values["model"], values["data"], training], sort_keys=True)


def groups(specs: Sequence[RunSpec], *, available_bytes: int | None = None) -> list[list[int]]:
    """The numbers of the specs that can be trained together, each group as large as memory allows."""
    found: dict[str, list[list[int]]] = {}
    alone = [plan(spec, available_bytes=available_bytes, in_new_process=True) for spec in specs]

    def fits(numbers: Sequence[int]) -> bool:
        some, plans = [specs[number] for number in numbers], [alone[number] for number in numbers]
        return plan_together(some, available_bytes=available_bytes, in_new_process=True, alone=plans).fits

    for number, spec in enumerate(specs):
        if why_alone(spec) is not None:
            found[f"alone {number}"] = [[number]]
            continue
        same = found.setdefault(base_of(spec), [[]])
        if same[-1] and not fits([*same[-1], number]):
            same.append([])
        same[-1].append(number)
    return sorted(group for same in found.values() for group in same)


class _Has:
    """What `difference` compares."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec


def _is_own(path: str) -> bool:
    part, _, name = path.partition(".")
    return part in ("method", "tracking") or (part == "training" and name in OWN)
