"""Ray's driver of a sweep, in a process of its own: `python -m nbtune.sweep.cluster_driver ADDRESS JOBS FOLDER`.

Ray ends a driver that loses its cluster, and its handlers and threads have no place in somebody's notebook. Orders come
as lines of JSON on standard input, answers go to standard output (see `nbtune.sweep.cluster`). It ends when its input
closes, and with it Ray ends what it started.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from nbtune._processes import at_most_wanted, cores, kill_family
from nbtune.errors import NbtuneError, SweepError
from nbtune.sweep.cluster_trial import Order, TrialActor, installed
from nbtune.sweep.inputs import Input, inputs_of
from nbtune.sweep.job import Job
from nbtune.sweep.mirror import Receiver
from nbtune.train.control import FILE as WISH

SHIPPED_CHUNK = 2**26  # bytes
OBJECT_STORE = 2**27  # bytes of memory for what a local Ray ships; more goes to the disk
SILENT_SECONDS = 60.0  # that a machine may be out of reach before its trial counts as dead
GO_ON = "Mend that; the same call goes on."
END_SECONDS = 20.0  # for trials to be killed, and for Ray to end


@dataclasses.dataclass
class _Trial:
    job: Job
    actor: Any
    receiver: Receiver
    inputs: list[Input]
    silent_since: float | None = None


class Driver:
    """Does what it is ordered to, until its orders end."""

    def __init__(self, jobs: int, folder: Path, *, local: bool, orders: queue.SimpleQueue, say: Callable) -> None:
        self._folder, self._orders, self._say = folder, orders, say
        nodes = alive()
        gpus = share([node.get("GPU", 0) for node in nodes], jobs)
        hosts = [node for node in nodes if node.get("GPU", 0)] if gpus else nodes
        self._cpus, self._gpus = share([node.get("CPU", 0) for node in hosts], jobs), gpus
        threads = max(1, int(self._cpus))
        self._threads = at_most_wanted(threads) if local else threads
        self._trials: dict[str, _Trial] = {}
        self._answers: dict[ray.ObjectRef, tuple[str, Callable[[_Trial, Any], None]]] = {}
        self._shipped: dict[tuple[str, Any], list[ray.ObjectRef]] = {}

    def serve(self) -> None:
        """Until the orders end. Raises OSError where what comes back cannot be written."""
        try:
            while self._obey():
                self._listen()
                self._forward_wishes()
        finally:
            self._end()

    def _obey(self) -> bool:
        while True:
            try:
                order = self._orders.get(timeout=0 if self._answers else 0.1)
            except queue.Empty:
                return True
            if order is None:
                return False
            if "job" in order:
                self._start(Job.from_dict(order["job"]))
            elif order["kill"] in self._trials:
                self._kill(self._trials[order["kill"]])

    def _start(self, job: Job) -> None:
        memory = job.memory_bytes if job.memory_bytes and not self._gpus else None
        wanted = {"num_cpus": self._cpus, "num_gpus": self._gpus, "memory": memory}
        remote: Any = ray.remote(TrialActor)
        actor = remote.options(**wanted, max_concurrency=4, max_restarts=0).remote()
        trial = self._trials[job.name] = _Trial(job, actor, Receiver(self._folder), inputs_of(job))
        self._ask(trial, actor.missing.remote(trial.inputs), self._placed)

    def _placed(self, trial: _Trial, missing: list[str]) -> None:
        """A machine has room for the trial: send there what it does not see."""
        self._say(placed=trial.job.name)
        job = trial.job
        try:
            shipped = {given.text: self._ship(given) for given in trial.inputs if given.text in missing}
        except OSError as error:
            self._conclude(trial, "failed", f"What it needs could not be read.\n{error}")
            return
        cwd_inode = job.cwd.stat().st_ino
        order = Order(job, job.notebook.read_bytes(), cwd_inode, trial.inputs, shipped, self._threads)
        self._ask(trial, trial.actor.begin.remote(order), self._look)

    def _ship(self, given: Input) -> dict[str, list[ray.ObjectRef]]:
        """Put the files into Ray's store, once for all trials: it brings them to each machine once."""
        for relative, facts in given.files.items():
            if (given.path, (relative, facts)) not in self._shipped:
                with given.file(relative).open("rb") as file:
                    chunks = [ray.put(chunk) for chunk in iter(lambda: file.read(SHIPPED_CHUNK), b"")]
                self._shipped[given.path, (relative, facts)] = chunks
        return {relative: self._shipped[given.path, (relative, facts)] for relative, facts in given.files.items()}

    def _look(self, trial: _Trial, _: None = None) -> None:
        self._ask(trial, trial.actor.look.remote(), self._looked)

    def _looked(self, trial: _Trial, found: tuple) -> None:
        look, ended = found
        trial.silent_since = None
        trial.receiver.take(look)
        if ended is None:
            self._look(trial)
            return
        self._conclude(trial, ended.outcome, ended.error)

    def _conclude(self, trial: _Trial, outcome: str, error: str | None) -> None:
        trial.actor.close.remote()
        trial.receiver.close()
        del self._trials[trial.job.name]
        self._say(ended=trial.job.name, outcome=outcome, error=error)

    def _ask(self, trial: _Trial, answer: ray.ObjectRef, then: Callable[[_Trial, Any], None]) -> None:
        self._answers[answer] = trial.job.name, then

    def _listen(self) -> None:
        """Take one answer of a trial, if there is one."""
        if not self._answers:
            return
        for answer in ray.wait(list(self._answers), num_returns=1, timeout=0.1)[0]:
            name, then = self._answers.pop(answer)
            trial = self._trials[name]
            try:
                then(trial, ray.get(answer))
            except ActorUnavailableError as error:
                self._bear(trial, error)
            except RayTaskError as error:  # in the actor's own code: a full disk there
                self._conclude(trial, "failed", f"Its machine could not go on with it.\n{error.cause}")
            except RayActorError as error:
                self._conclude(trial, "died", _died(error))

    def _bear(self, trial: _Trial, error: RayActorError) -> None:
        """Ask again for a while: the network may come back."""
        trial.silent_since = trial.silent_since or time.monotonic()
        if time.monotonic() - trial.silent_since > SILENT_SECONDS:
            ray.kill(trial.actor)
            self._conclude(trial, "died", _died(error))
        else:
            time.sleep(0.5)
            self._ask(trial, trial.actor.look.remote(anew=True), self._looked)  # what it told may have been lost

    def _kill(self, trial: _Trial) -> None:
        """A trial that has its process tells its end itself; of one that waits for room, Ray does."""
        waits = any(name == trial.job.name and then == self._placed for name, then in self._answers.values())
        if waits:
            ray.kill(trial.actor)
        else:
            trial.actor.kill.remote()

    def _forward_wishes(self) -> None:
        for trial in self._trials.values():
            for run in trial.receiver.runs:
                with suppress(FileNotFoundError):
                    wish = (run / WISH).read_text(encoding="utf-8")
                    (run / WISH).unlink()
                    trial.actor.wish.remote(run.name, wish)

    def _end(self) -> None:
        closing = [trial.actor.close.remote() for trial in self._trials.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=END_SECONDS)
        for trial in self._trials.values():
            trial.receiver.close()
            ray.kill(trial.actor)


def share(amounts: Sequence[float], jobs: int) -> float:
    """How much of what each machine has one of `jobs` trials gets, so that all run at once.

    A whole number, as large as it can be; where there is less than one for each, the part of one that some share.
    """
    whole = [int(amount) for amount in amounts if amount >= 1]
    if not whole:
        return 0.0
    for part in range(max(whole), 0, -1):
        if sum(amount // part for amount in whole) >= jobs:
            return float(part)
    return math.floor(10_000 / math.ceil(jobs / sum(whole))) / 10_000  # Ray counts in ten-thousandths


def alive() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A Ray to use: the one at an address, or "local": one of our own, that ends with the block."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address != "local":
        ray.init(address=address, **quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = tempfile.mkdtemp(prefix="nbtune-ray-", dir="/tmp")  # a socket's path has 107 letters at most
    try:
        ray.init(
            address="local",
            num_cpus=cores(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            _memory=psutil.virtual_memory().total,
            _temp_dir=folder,
            **quiet,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def require_same_version() -> None:
    """Raise SweepError where the machines of the cluster have no nbtune, or another one."""
    try:
        version = ray.get(ray.remote(num_cpus=0)(installed).remote(), timeout=60)
    except (RayTaskError, GetTimeoutError) as error:
        line = str(error).strip().splitlines()[-1]
        raise SweepError("The cluster cannot run nbtune", line, "Install the same nbtune on its machines.") from error
    if version != installed():
        raise SweepError(f"The cluster has nbtune {version}", f"Here is {installed()}.", "Install the same.")


def _died(error: RayActorError) -> str:
    text = str(error)
    if "node" in text.lower() and ("node died" in text.lower() or "node has" in text.lower()):
        return "Its machine was lost."
    return "Its Ray worker ended: it was killed, or the machine was lost or ran out of memory."


def main() -> None:
    address, jobs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints is no answer

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    try:
        with connected(address):
            if address != "local":
                require_same_version()
            say(nodes=alive(), address=ray.get_runtime_context().gcs_address)
            Driver(jobs, folder, local=address == "local", orders=orders, say=say).serve()
    except NbtuneError as error:
        say(title=error.title, message=error.message, remedy=error.remedy)
    except BrokenPipeError:
        return  # nobody listens any more
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        say(title="Ray cannot be used", message=f"{type(error).__name__}: {error}", remedy=GO_ON)
    except OSError as error:
        say(title="What trials wrote on Ray could not be kept", message=str(error), remedy=GO_ON)


def _read(orders: queue.SimpleQueue) -> None:
    """Hand on what standard input says; some time after it closed, this process is gone whatever Ray does."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    orders.put(None)
    time.sleep(2 * END_SECONDS)
    kill_family(os.getpid())
    os._exit(1)


if __name__ == "__main__":
    main()
