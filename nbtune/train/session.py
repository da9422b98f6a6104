"""One life of a run: read the data, load the model, attach the adapter, train, write what came out.

Called in the run's thread, once for a new run and once for each resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from nbtune import _files
from nbtune._transformers import PreTrainedModel
from nbtune.data import Dataset, load_examples
from nbtune.fused import fused
from nbtune.models import LoadedModel, attach_adapter, compute_dtype, default_device, load
from nbtune.models.training import trained_model
from nbtune.modules.offload import CudaLane, offloaded_checkpoints
from nbtune.peft import PeftModel
from nbtune.peft.configs.lora import AdaLoraConfig
from nbtune.plan import Plan, plan
from nbtune.spec import RunSpec
from nbtune.train import checkpoint
from nbtune.train.events import Event, read_events
from nbtune.train.loop import Outcome, train
from nbtune.train.loss import CausalLMLoss
from nbtune.train.memory import PeakMemory, release, trim_heap
from nbtune.train.room import Room, naming_lack_of_memory
from nbtune.train.samples import Sampler, questions
from nbtune.train.schedule import Schedule, eval_batches
from nbtune.train.tracking import MlflowFollower


def train_in_folder(
    path: Path,
    spec: RunSpec,
    *,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool] = lambda: False,
) -> None:
    """Train `spec` in the run folder `path`, from its last checkpoint if it has one, and report to `on_event`.

    Raises whatever goes wrong. MLflow is told about the end in any case.
    """
    with _followed_by_mlflow(path, spec, on_event):
        with PeakMemory(default_device()) as memory:
            outcome = _train(path, spec, memory, on_event, should_stop, should_pause)
        status = "stopped" if outcome.stopped else "finished"
        on_event({"type": "end", "step": outcome.step, "status": status, "peak_memory_bytes": memory.peak_bytes})


def _train(
    path: Path,
    spec: RunSpec,
    memory: PeakMemory,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    should_pause: Callable[[], bool],
) -> Outcome:
    checkpoints = path / "checkpoints"
    if any(event["type"] == "start" for event in read_events(path)):
        saved = checkpoint.checkpoints(checkpoints)
        on_event({"type": "resume", "step": checkpoint.step_of(saved[-1]) if saved else 0})

    def on_status(message: str) -> None:
        on_event({"type": "status", "message": message})

    planned = plan(spec)  # before the weights are here, which the process would seem to hold anyway
    training = spec.training.model_copy(
        update={
            "per_device_train_batch_size": planned.micro_batch_size,
            "gradient_accumulation_steps": planned.accumulation,
        }
    )
    on_status("loading the model")
    with naming_lack_of_memory(planned, "base weights", "the model was loaded"):
        loaded = load(trained_model(spec), for_training=True, on_status=on_status)
    loading_peak = memory.peak_bytes  # much of it pages of the weights' files, which the system may drop
    trim_heap()
    memory.restart()
    on_status("reading the data")
    dataset = load_examples(spec.data, loaded.tokenizer, spec.training.max_length, on_status=on_status)
    for reason, count in dataset.dropped.items():
        on_event({"type": "warning", "message": f"{count} rows were left out: {reason}"})

    schedule = Schedule(dataset.train, training, spec.virtual_tokens)
    adapted = _attach(loaded.model, _with_steps(spec, schedule.total_steps))
    room = Room(loaded.model, planned, may_recompute=training.gradient_checkpointing is not False)
    # Blocks are fused or compiled: the compiler does not look into fused ones.
    with (
        naming_lack_of_memory(planned, "activations", "training"),
        nullcontext() if spec.training.torch_compile else fused(loaded.model) as blocks,
        _offloaded(loaded, spec),
    ):
        counts = dict(blocks.counts) if blocks is not None else {}
        on_event(
            {
                **_start_event(spec, loaded, dataset, schedule, planned),
                "fused": counts,
                "loading_peak_bytes": loading_peak,
            }
        )
        sampler = Sampler(
            loaded.model, adapted, questions(training, dataset.eval, loaded.tokenizer), loaded.tokenizer, should_stop
        )
        outcome = train(
            CausalLMLoss(loaded.model, spec.training.label_smoothing_factor),
            adapted,
            schedule,
            eval_batches(dataset.eval, training, spec.virtual_tokens),
            training,
            checkpoints=checkpoints,
            compute_dtype=compute_dtype(spec.model.dtype, loaded.device),
            memory=memory,
            room=room,
            sampler=sampler,
            on_event=on_event,
            should_stop=should_stop,
            should_pause=should_pause,
        )
    on_status("writing the adapter" if adapted is not None else "writing the model")
    _write_result(path, spec, loaded, adapted)
    return outcome


def _with_steps(spec: RunSpec, total_steps: int) -> RunSpec:
    """The spec with an AdaLoRA that knows how many steps there are."""
    if not isinstance(spec.method, AdaLoraConfig) or spec.method.total_step is not None:
        return spec
    return spec.model_copy(update={"method": spec.method.replace(total_step=total_steps)})


def _attach(model: PreTrainedModel, spec: RunSpec) -> PeftModel | None:
    """The adapter on `model`, with first weights that the seed fixes; None where every weight is trained."""
    if spec.method == "full":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.training.seed)
        return attach_adapter(model, spec)


def _offloaded(loaded: LoadedModel, spec: RunSpec) -> AbstractContextManager[None]:
    """Checkpoints in the host's memory, where the spec asks for it and that is not where they are anyway."""
    if not spec.training.activation_offloading or loaded.device.type != "cuda":
        return nullcontext()
    return offloaded_checkpoints(loaded.model, CudaLane(loaded.device))


def _start_event(spec: RunSpec, loaded: LoadedModel, dataset: Dataset, schedule: Schedule, planned: Plan) -> Event:
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
        "device": str(loaded.device),
        "dtype": str(compute_dtype(spec.model.dtype, loaded.device)).removeprefix("torch."),
        "train_examples": len(dataset.train),
        "eval_examples": len(dataset.eval),
        "data_fingerprint": dataset.fingerprint,
    }


def _write_result(path: Path, spec: RunSpec, loaded: LoadedModel, adapted: PeftModel | None) -> None:
    """Write `adapter/`, or `model/` after full fine-tuning, in place of what an earlier life of the run left there."""
    target = path / ("adapter" if adapted is not None else "model")
    new, old = path / f".{target.name}.new", path / f".{target.name}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with _files.atomic_folder(new) as folder:
        if adapted is not None:
            adapted.save_pretrained(folder)
        else:
            loaded.model.save_pretrained(folder)
        if adapted is None or spec.model.chat_template is not None:  # an adapter is asked as it was trained
            loaded.tokenizer.save_pretrained(folder)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _followed_by_mlflow(path: Path, spec: RunSpec, on_event: Callable[[Event], None]) -> Iterator[None]:
    if not spec.tracking.mlflow:
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
