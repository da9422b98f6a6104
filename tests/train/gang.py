"""Processes that train together, forked from one that has imported everything: `python gang.py MODEL FOLDER`.

Each case is a run of its own in FOLDER, on two processes of gloo; what came out is read by test_world.py. A process in
which autograd has run cannot be forked, so the one that forks trains nothing.
"""

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from nbtune.errors import RunError
from nbtune.peft.configs.lora import LoraConfig
from nbtune.run import Run
from nbtune.spec import RunSpec
from nbtune.train import worker
from nbtune.train.launch import FOLDER
from nbtune.train.loss import CausalLMLoss
from nbtune.train.world import World

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
ROWS = [
    {"instruction": f"Say {n} in English.", "output": " ".join([word] * (1 + n % 5))} for n, word in enumerate(WORDS)
]
TRAINING = {
    "max_steps": 4, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3,
    "eval_steps": 2, "eval_samples": 0, "save_steps": 2, "save_total_limit": 9, "learning_rate": 1e-2,
}  # fmt: skip
ADAPTER = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj", "lm_head"])


def spec(model: Path, method, **training) -> RunSpec:
    return RunSpec(
        model={"name": str(model), "dtype": "float32"}, data=ROWS, method=method, training=TRAINING | training,
        tracking={"mlflow": False},
    ).updated(eval_fraction=0.3)  # fmt: skip


class Case(NamedTuple):
    name: str
    spec: RunSpec
    fault: Callable[[int], None] = lambda rank: None  # done by each process before it trains


def train(folder: Path, cases: list[Case], size: int) -> None:
    """Train each case's run on `size` processes; alone it is a run like any other."""
    runs = [
        (case, Run.create(case.spec.updated(num_processes=size), runs_dir=folder, run_id=case.name)) for case in cases
    ]
    for _, run in runs:
        (run.path / FOLDER).mkdir()

    def work(rank: int, join: Callable[[], None]) -> None:
        for case, run in runs:
            if size == 1:
                run.train_here(World())
                continue
            join()
            case.fault(rank)
            worker.share(run.path)

    in_processes(work, size, meetings=len(cases))


def in_processes(work: Callable[[int, Callable[[], None]], None], size: int, meetings: int = 1) -> None:
    """Do `work(rank, join)` in `size` forked processes; what `join` leaves in the environment lets them meet."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(meetings)]
    ports = iter([str(store.port) for store in stores])
    children = []

    def join(rank: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({key: str(value) for key, value in ranks.items()})
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": next(ports), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update(told)

    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                work(rank, functools.partial(join, rank))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - it must not go on as the one that forked it
                traceback.print_exc()
                os._exit(9)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def raising(rank: int) -> None:
    """The last process finds something wrong."""
    if rank == 1:
        CausalLMLoss.verify = lambda *args, **kwargs: 1 / 0  # of this forked process


def sums(folder: Path) -> None:
    """What `World` does with numbers and gradients; writes what each process saw."""

    def work(rank: int, join: Callable[[], None]) -> None:
        join()
        world = World.join()
        parameters = [torch.nn.Parameter(torch.full((5, 3), float(rank))) for _ in range(3)]
        parameters[0].grad = torch.full((5, 3), 1.0 + rank)
        if rank == 1:  # a process without a micro-batch, or without a token for some expert, has none
            parameters[1].grad = torch.full((5, 3), 7.0)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            sent = world.sum_gradients(parameters)
        world.equalise(parameters)
        seen = {
            "sent": sent,
            "reduced": [event.input_shapes[0] for event in profiled.events() if event.name == "gloo:all_reduce"],
            "gradients": [None if p.grad is None else p.grad.unique().tolist() for p in parameters],
            "values": [p.detach().unique().tolist() for p in parameters],
            "sum": world.sum(torch.tensor([1.0, float(rank)])).tolist(),
            "least": world.least(7 - rank),
            "any": [world.any(rank == 1), world.any(False)],
            "first_says": [world.first_says(lambda: rank == 0), world.first_says(lambda: rank == 1)],
            "value": world.value_of_first(lambda: {"rank": rank, "text": "ü"}),
        }
        world.leave()
        (folder / f"sums-{rank}.json").write_text(json.dumps(seen))

    in_processes(work, 2)


def hanging(folder: Path) -> None:
    """The second process does not come to a sum; the first writes what it is told."""

    def work(rank: int, join: Callable[[], None]) -> None:
        join()
        os.environ["NBTUNE_PATIENCE"] = "3"
        world = World.join()
        if rank == 1:
            time.sleep(8)  # longer than the first one waits and calls the roll
        try:
            world.sum(torch.ones(1))
        except RunError as error:
            (folder / f"hanging-{rank}.json").write_text(json.dumps([type(error).__name__, *str(error).splitlines()]))

    in_processes(work, 2)


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sums(folder)
    hanging(folder)
    adapter, full = spec(model, ADAPTER), spec(model, "full")
    train(folder, [Case("alone", adapter), Case("full-alone", full)], 1)
    sampled = adapter.updated(sharding="full", eval_samples=1, eval_steps=0)
    well = [
        Case("two", adapter),
        Case("sharded-base", sampled),
        Case("full-sharded", full.updated(gradient_checkpointing=True)),
    ]
    train(folder, [*well, Case("raises", adapter, raising)], 2)


if __name__ == "__main__":
    main()
