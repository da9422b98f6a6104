"""Several runs in one process on one base model: what `session.py` is for a run alone.

The model is loaded and the data are read once, each run's adapter is attached under a name of its own, and then every
run is trained by the same loop as alone, in its own thread, from its own folder.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nbtune.data import Dataset, load_examples
from nbtune.errors import RunError
from nbtune.fused import fused
from nbtune.fused.stretches import stretched
from nbtune.models import LoadedModel, default_device, load
from nbtune.plan.together import GroupPlan, plan_together
from nbtune.spec import RunSpec
from nbtune.train import checkpoint
from nbtune.train.events import Event, read_events
from nbtune.train.loop import Outcome, train
from nbtune.train.loss import CausalLMLoss
from nbtune.train.member import OwnAdapter
from nbtune.train.memory import PeakMemory, trim_heap
from nbtune.train.room import Room, naming_lack_of_memory
from nbtune.train.samples import Sampler, questions
from nbtune.train.schedule import Schedule, eval_batches
from nbtune.train.session import attach, followed_by_mlflow, start_event, with_steps, write_result
from nbtune.train.shared import Member, SharedBase

OnEvent = Callable[[Event], None]


@dataclasses.dataclass
class _Place:
    """A run among the others."""

    number: int
    spec: RunSpec
    on_event: OnEvent | None = None  # once its thread is there
    adapted: OwnAdapter | None = None
    schedule: Schedule | None = None
    member: Member | None = None  # once it can be trained
    error: BaseException | None = None  # why it cannot
    over: bool = False


@dataclasses.dataclass(frozen=True)
class _Base:
    """What all runs share."""

    loaded: LoadedModel
    dataset: Dataset
    room: Room
    memory: PeakMemory
    loading_peak: int
    fused: Mapping[str, int]


class Together:
    """The runs of a group, by their folders. `conduct` is the body of the one thread that computes.

    Each run's own thread calls `train_in_folder`, all of them, in any order; the specs differ in what
    `nbtune.together` allows.
    """

    def __init__(self, runs: Mapping[Path, RunSpec]) -> None:
        self._places = {path: _Place(number, spec) for number, (path, spec) in enumerate(runs.items())}
        self._planned: GroupPlan | None = None
        self._base: _Base | None = None
        self._changed = threading.Condition()
        self._ready = False

    def train_in_folder(
        self,
        path: Path,
        spec: RunSpec,
        *,
        on_event: OnEvent,
        should_stop: Callable[[], bool],
        should_pause: Callable[[], bool] = lambda: False,
    ) -> None:
        """`session.train_in_folder` for one of the runs. Raises what goes wrong with this one."""
        place = self._places[path]
        try:
            with followed_by_mlflow(path, spec, on_event):
                if any(event["type"] == "start" for event in read_events(path)):
                    saved = checkpoint.checkpoints(path / "checkpoints")
                    on_event({"type": "resume", "step": checkpoint.step_of(saved[-1]) if saved else 0})
                self._take(place, on_event)
                outcome = self._train(path, place, on_event, should_stop, should_pause)
                self._leave(place)  # the others go on while this one is written
                on_event({"type": "status", "message": "writing the adapter"})
                assert self._base is not None
                write_result(path, spec, self._base.loaded, place.adapted)
                status, peak = "stopped" if outcome.stopped else "finished", self._base.memory.peak_bytes
                on_event({"type": "end", "step": outcome.step, "status": status, "peak_memory_bytes": peak})
        finally:
            self._leave(place)

    def conduct(self) -> None:
        """Load, attach, and compute for the runs until the last has ended."""
        with self._changed:
            self._changed.wait_for(lambda: all(p.on_event is not None or p.over for p in self._places.values()))
        try:
            with PeakMemory(default_device()) as memory:
                self._conduct(memory)
        except BaseException as error:  # noqa: BLE001 - every run's thread raises it
            self.give_up(error)
        finally:
            self._tell_ready()

    def give_up(self, error: BaseException) -> None:
        """Have the threads of all runs that have not begun raise this error."""
        for place in self._places.values():
            place.error = place.error or error
        self._tell_ready()

    def _conduct(self, memory: PeakMemory) -> None:
        places = list(self._places.values())
        planned = self._planned = plan_together([place.spec for place in places])
        spec = places[0].spec
        self._say("loading the model")
        with naming_lack_of_memory(planned.whole, "base weights", "the model was loaded"):
            loaded = load(spec.model, for_training=True, on_status=self._say)
        loading_peak = memory.peak_bytes
        trim_heap()
        memory.restart()
        self._say("reading the data")
        dataset = load_examples(spec.data, loaded.tokenizer, spec.training.max_length, on_status=self._say)
        for reason, count in dataset.dropped.items():
            self._report({"type": "warning", "message": f"{count} rows were left out: {reason}"})
        for place in places:
            self._attach(place, loaded, dataset)
        room = Room(
            loaded.model, planned.whole, may_recompute=all(p.spec.training.gradient_checkpointing for p in places)
        )
        attached = [place for place in places if place.error is None and not place.over]
        if not attached:
            return
        with stretched(loaded.model), fused(loaded.model) as blocks:
            self._base = _Base(loaded, dataset, room, memory, loading_peak, dict(blocks.counts))
            shared = SharedBase(CausalLMLoss(loaded.model), planned.width, self._warn)
            for place in attached:
                assert place.adapted is not None
                place.member = shared.join(place.adapted, place.spec.training.label_smoothing_factor)
            self._tell_ready()
            shared.conduct()

    def _attach(self, place: _Place, loaded: LoadedModel, dataset: Dataset) -> None:
        """Give a run its schedule and its adapter; what fails is its own error."""
        assert self._planned is not None
        try:
            training = self._planned.training(place.number)
            place.schedule = Schedule(dataset.train, training, place.spec.virtual_tokens)
            name = f"run{place.number:03d}"
            attach(loaded.model, with_steps(place.spec, place.schedule.total_steps), name)
            place.adapted = OwnAdapter(loaded.model, name)
        except Exception as error:  # noqa: BLE001 - the run's thread raises it
            place.error = error

    def _take(self, place: _Place, on_event: OnEvent) -> None:
        """Wait until the run can be trained. Raises what keeps it from that."""
        with self._changed:
            if place.on_event is not None:
                raise RunError("This run is being trained already")
            place.on_event = on_event
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
        if place.error is not None:
            raise place.error

    def _train(
        self,
        path: Path,
        place: _Place,
        on_event: OnEvent,
        should_stop: Callable[[], bool],
        should_pause: Callable[[], bool],
    ) -> Outcome:
        """The run's part, in its own thread."""
        base, member, adapted, schedule, planned = (
            self._base, place.member, place.adapted, place.schedule, self._planned,
        )  # fmt: skip
        assert base is not None
        assert member is not None
        assert adapted is not None
        assert schedule is not None
        assert planned is not None
        member.begin()
        training = planned.training(place.number)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        others = sum(_size(other.adapted) for other in self._places.values() if other is not place)
        event = start_event(place.spec, base.loaded, base.dataset, schedule, planned.plans[place.number])
        on_event(
            {
                **event,
                "planned_peak_bytes": planned.whole.peak_bytes,
                "planned_parts": planned.whole.parts,
                "checkpointed_layers": planned.whole.checkpointed_layers,
                "trainable_parameters": trained,
                "total_parameters": event["total_parameters"] - others,
                "together": len(self._places),
                "fused": dict(base.fused),
                "loading_peak_bytes": base.loading_peak,
            }
        )
        model, tokenizer = base.loaded.model, base.loaded.tokenizer
        asked = questions(training, base.dataset.eval, tokenizer)
        sampler = _Sampler(member, Sampler(model, adapted, asked, tokenizer, should_stop))
        return train(
            member,  # pyright: ignore[reportArgumentType] - which stands for a CausalLMLoss
            adapted,
            schedule,
            eval_batches(base.dataset.eval, training, place.spec.virtual_tokens),
            training,
            checkpoints=path / "checkpoints",
            compute_dtype=torch.float32,  # of the adapters: the base computes as it was loaded
            memory=base.memory,
            room=base.room,
            sampler=sampler,  # pyright: ignore[reportArgumentType] - which stands for a Sampler
            on_event=on_event,
            should_stop=should_stop,
            should_pause=member.away_while(should_pause),
        )

    def _leave(self, place: _Place) -> None:
        """The run needs the base no more."""
        with self._changed:
            place.over = True
            self._changed.notify_all()
        if place.member is not None:
            place.member.leave()

    def _tell_ready(self) -> None:
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def _report(self, event: Event) -> None:
        """Tell all runs that are there, and have not failed."""
        for place in self._places.values():
            if place.on_event is not None and place.error is None and not place.over:
                place.on_event(event)

    def _say(self, message: str) -> None:
        self._report({"type": "status", "message": message})

    def _warn(self, message: str) -> None:
        self._report({"type": "warning", "message": message})


def _size(adapted: OwnAdapter | None) -> int:
    return 0 if adapted is None else sum(parameter.numel() for parameter in adapted.parameters())


class _Sampler:
    """Asks the model as the run's adapter has it, while the other runs wait."""

    def __init__(self, member: Member, sampler: Sampler) -> None:
        self._member, self._sampler = member, sampler

    def samples(self) -> list[dict[str, str]]:
        return self._member.by_itself(self._sampler.samples)
