"""One life of a run: read the data, load the model, attach the adapter, train, write what came out.

Called in the run's thread, once for a new run and once for each resume.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from nbtune import _files
from nbtune._transformers import PreTrainedModel
from nbtune.data import Dataset, load_examples
from nbtune.fused import fused
from nbtune.models import LoadedModel, attach_adapter, compute_dtype, default_device, load
from nbtune.models.machine import available_memory
from nbtune.models.training import trained_model
from nbtune.modules.offload import CudaLane, offloaded_checkpoints
from nbtune.peft import PeftModel
from nbtune.peft.configs.lora import AdaLoraConfig
from nbtune.plan import Plan, plan
from nbtune.spec import RunSpec
from nbtune.train import checkpoint
from nbtune.train.events import Event, read_events
from nbtune.train.launch import train_in_processes
from nbtune.train.loop import Outcome, train
from nbtune.train.loss import CausalLMLoss
from nbtune.train.memory import PeakMemory, map_large_blocks, release, trim_heap, used_bytes
from nbtune.train.room import Room, naming_lack_of_memory
from nbtune.train.samples import Sampler, questions
from nbtune.train.schedule import Schedule, eval_batches
from nbtune.train.sharding import shard, whole_state
from nbtune.train.tracking import MlflowFollower
from nbtune.train.world import ALONE, World


def train_in_folder(
    path: Path,
    spec: RunSpec,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool] = lambda: False,
    world: World = ALONE,
    ray: str | None = None,
) -> None:
    """Train `spec` in the run folder `path`, from its last checkpoint if it has one, and report to `on_event`.

    Where it takes several processes and this is not the first of such a `world`, they are started here, or by the Ray
    at an address. The first of them writes the events; they read the wishes in the folder.

    Raises whatever goes wrong. MLflow is told about the end in any case.
    """
    with followed_by_mlflow(path, spec, on_event):
        if ray is not None or spec.training.num_processes > world.size:
            on_event({"type": "status", "message": f"starting {spec.training.num_processes} processes"})
            train_in_processes(path, spec.training.num_processes, ray=ray)
        else:
            train_here(path, spec, on_event=on_event, should_stop=should_stop, should_pause=should_pause, world=world)


def train_here(
    path: Path,
    spec: RunSpec,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool],
    world: World = ALONE,
) -> None:
    """`train_in_folder` in this process, which is one of `world`; only what the first one reports is heard."""
    with PeakMemory(default_device()) as memory:
        outcome = _train(path, spec, memory, on_event, should_stop, should_pause, world)
    status = "stopped" if outcome.stopped else "finished"
    on_event({"type": "end", "step": outcome.step, "status": status, "peak_memory_bytes": memory.peak_bytes})


def _train(
    path: Path,
    spec: RunSpec,
    memory: PeakMemory,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool],
    world: World,
) -> Outcome:
    checkpoints = path / "checkpoints"
    if any(event["type"] == "start" for event in read_events(path)):
        saved = checkpoint.checkpoints(checkpoints)
        on_event({"type": "resume", "step": checkpoint.step_of(saved[-1]) if saved else 0})

    def on_status(message: str) -> None:
        on_event({"type": "status", "message": message})

    planned = _plan(spec, world)  # before the weights are here, which the process would seem to hold anyway
    world = dataclasses.replace(world, in_step=planned.sharded)
    training = spec.training.model_copy(
        update={
            "per_device_train_batch_size": planned.micro_batch_size,
            "gradient_accumulation_steps": planned.accumulation,
        }
    )
    on_status("loading the model")
    with naming_lack_of_memory(planned, "base weights", "the model was loaded"):
        loaded = _load(spec, on_status, on_host=planned.sharded)
    loading_peak = memory.peak_bytes  # much of it pages of the weights' files, which the system may drop
    trim_heap()
    memory.restart()
    on_status("reading the data")
    dataset = load_examples(spec.data, loaded.tokenizer, spec.training.max_length, on_status=on_status)
    for reason, count in dataset.dropped.items():
        on_event({"type": "warning", "message": f"{count} rows were left out: {reason}"})

    schedule = Schedule(dataset.train, training, spec.virtual_tokens)
    adapted = attach(loaded.model, with_steps(spec, schedule.total_steps))
    room = Room(loaded.model, planned, may_recompute=training.gradient_checkpointing is not False)
    # Blocks are fused or compiled: the compiler does not look into fused ones.
    with (
        naming_lack_of_memory(planned, "activations", "training"),
        nullcontext() if spec.training.torch_compile else fused(loaded.model) as blocks,
        _offloaded(loaded, spec),
    ):
        counts = dict(blocks.counts) if blocks is not None else {}
        start = start_event(spec, loaded, dataset, schedule, planned)  # of whole weights
        loss_model = CausalLMLoss(loaded.model, spec.training.label_smoothing_factor)
        precision = compute_dtype(spec.model.dtype, loaded.device)
        if planned.sharded:
            map_large_blocks()
            shard(loss_model, loaded.device, precision, every_weight=adapted is None)
            trim_heap()
            loading_peak = max(loading_peak, memory.peak_bytes)
            memory.restart()
        on_event(
            {
                **start,
                "fused": counts,
                "loading_peak_bytes": loading_peak,
            }
        )
        sampler = Sampler(
            loaded.model,
            adapted,
            questions(training, dataset.eval, loaded.tokenizer),
            loaded.tokenizer,
            should_stop,
            world.first_says if world.in_step else lambda ask: ask(),
        )
        outcome = train(
            loss_model,
            adapted,
            schedule,
            eval_batches(dataset.eval, training, spec.virtual_tokens),
            training,
            checkpoints=checkpoints,
            compute_dtype=precision,
            memory=memory,
            room=room,
            sampler=sampler if world.is_first or world.in_step else None,
            on_event=on_event,
            should_stop=should_stop,
            should_pause=should_pause,
            world=world,
        )
    on_status("writing the adapter" if adapted is not None else "writing the model")
    weights = whole_state(loaded.model, keep=world.is_first) if planned.sharded and adapted is None else None
    if world.is_first:
        write_result(path, spec, loaded, adapted, weights)
    return outcome


def _plan(spec: RunSpec, world: World) -> Plan:
    """The plan of the first process, for what is free to every one."""
    if world.alone:
        return plan(spec)
    device = default_device()
    share = 1 if device.type == "cuda" else world.local_size  # the processes of a machine have its memory together
    available = world.least(used_bytes(device) + available_memory(device) // share)
    return Plan(**world.value_of_first(lambda: dataclasses.asdict(plan(spec, available_bytes=available))))


def _load(spec: RunSpec, on_status: Callable[[str], None], *, on_host: bool) -> LoadedModel:
    """The model to train; one that will be sharded in the host's memory, in the precision of the device."""
    model, device = trained_model(spec), default_device()
    if not on_host:
        return load(model, for_training=True, on_status=on_status)
    named = str(compute_dtype(model.dtype, device)).removeprefix("torch.")
    model = model.model_copy(update={"dtype": named})
    return dataclasses.replace(load(model, device="cpu", for_training=True, on_status=on_status), device=device)


def with_steps(spec: RunSpec, total_steps: int) -> RunSpec:
    """The spec with an AdaLoRA that knows how many steps there are."""
    if not isinstance(spec.method, AdaLoraConfig) or spec.method.total_step is not None:
        return spec
    return spec.model_copy(update={"method": spec.method.replace(total_step=total_steps)})


def attach(model: PreTrainedModel, spec: RunSpec, name: str = "default") -> PeftModel | None:
    """The adapter on `model`, with first weights that the seed fixes; None where every weight is trained."""
    if spec.method == "full":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.training.seed)
        return attach_adapter(model, spec, name)


def _offloaded(loaded: LoadedModel, spec: RunSpec) -> AbstractContextManager[None]:
    """Checkpoints in the host's memory, where the spec asks for it and that is not where they are anyway."""
    if not spec.training.activation_offloading or loaded.device.type != "cuda":
        return nullcontext()
    return offloaded_checkpoints(loaded.model, CudaLane(loaded.device))


def start_event(spec: RunSpec, loaded: LoadedModel, dataset: Dataset, schedule: Schedule, planned: Plan) -> Event:
    parameters = list(loaded.model.parameters())
    return {
        "type": "start",
        "step": 0,
        "total_steps": schedule.total_steps,
        "model": spec.model.name,
        "method": spec.method_name,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "planned_peak_bytes": planned.peak_bytes,
        "planned_parts": planned.parts,
        "micro_batch_size": planned.micro_batch_size,
        "accumulation": planned.accumulation,
        "checkpointed_layers": planned.checkpointed_layers,
        "packing_length": planned.packing_length,
        "processes": spec.training.num_processes,
        "sharded": planned.sharded,
        "device": str(loaded.device),
        "dtype": str(compute_dtype(spec.model.dtype, loaded.device)).removeprefix("torch."),
        "train_examples": len(dataset.train),
        "eval_examples": len(dataset.eval),
        "data_fingerprint": dataset.fingerprint,
    }


def write_result(
    path: Path,
    spec: RunSpec,
    loaded: LoadedModel,
    adapted: PeftModel | None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write `adapter/`, or `model/` after full fine-tuning, in place of what an earlier life of the run left there.

    `weights` are the whole ones of a model whose own are sharded.
    """
    target = path / ("adapter" if adapted is not None else "model")
    new, old = path / f".{target.name}.new", path / f".{target.name}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with _files.atomic_folder(new) as folder:
        if adapted is not None:
            adapted.save_pretrained(folder)
        else:
            loaded.model.save_pretrained(folder, state_dict=weights)
        if adapted is None or spec.model.chat_template is not None:  # an adapter is asked as it was trained
            loaded.tokenizer.save_pretrained(folder)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def followed_by_mlflow(path: Path, spec: RunSpec, on_event: Callable[[Event], None]) -> Iterator[None]:
    elsewhere = "NBTUNE_MLFLOW_LATER" in os.environ and not (spec.tracking.tracking_uri or "").startswith("http")
    if not spec.tracking.mlflow or elsewhere:  # a trial on another machine: the sweep's own sends it when it has it
        yield
        return
    follower = MlflowFollower(path, spec, on_warning=lambda message: on_event({"type": "warning", "message": message}))
    try:
        yield
    finally:
        follower.close()


def release_memory() -> None:
    """Give the memory of a finished life back to the system."""
    release(default_device())
