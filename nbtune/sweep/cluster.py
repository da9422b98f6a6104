"""Jobs on a Ray cluster: placed by the CPUs, GPUs and memory that they take, their files brought there and back.

    executor = RayExecutor("auto", jobs=4, folder=Path("sweeps/train-1a2b3c4d"))

Ray is spoken to by a process of its own (`nbtune.sweep.cluster_driver`), which this one orders about and listens to.
When this process ends, whatever ends it, that one does, and with it all trials.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from nbtune._processes import kill_family
from nbtune._ray import environment, probe, resolved
from nbtune.errors import SweepError
from nbtune.sweep.job import Ended, Job

READY_SECONDS = 120.0  # for a Ray to be there, or to start on a busy machine
END_SECONDS = 30.0  # for it to end

LOST = {"title": "Ray was lost", "message": "", "remedy": "The same call goes on."}  # the last answer of all


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the machines of a cluster have, in Ray's words: `CPU`, `GPU`, `memory` in bytes."""

    nodes: Sequence[Mapping[str, float]]

    @property
    def memory_bytes(self) -> int | None:
        """What one trial may take: a machine's memory. None where there are GPUs, whose memory Ray does not know."""
        if any(node.get("GPU", 0) for node in self.nodes):
            return None
        return int(max(node.get("memory", 0) for node in self.nodes))


def require_ray(address: str, gpus: list[str] | None = None) -> None:
    """Raise SweepError where Ray is not installed, or nothing can be at this address."""
    if gpus is not None and address != "local":
        raise SweepError("gpus names GPUs of this machine", "A cluster deals out its own.", "Leave it out.")
    if importlib.util.find_spec("ray") is None:
        raise SweepError("Ray is not installed", "", "pip install 'nbtune[cluster]'")
    where = resolved(address)
    try:
        probe(address)
    except ValueError as error:
        raise SweepError(str(error), "", 'Give "auto", "local", "HOST:PORT" or "ray://HOST:PORT".') from error
    except OSError as error:
        raise SweepError(f"No Ray answers at {where}", str(error), "Start it, or correct the address.") from error


def look(address: str) -> Cluster:
    """What there is at an address. Raises SweepError where it cannot be used: no Ray, another version, no nbtune."""
    require_ray(address)
    driver = _Driver(address, 1, Path.cwd(), None)
    driver.close()
    return Cluster(driver.facts["nodes"])


class RayExecutor:
    """`jobs` trials at a time, each with its share of the machines; `folder` is the sweep's.

    `gpus` are those of this machine that a Ray of its own may use, as `CUDA_VISIBLE_DEVICES` names them.
    Raises SweepError where Ray cannot be used.
    """

    def __init__(self, address: str, jobs: int, folder: Path, gpus: list[str] | None = None) -> None:
        require_ray(address)
        self._jobs = jobs
        self._driver = _Driver(address, jobs, folder, gpus)
        self._running: set[str] = set()
        self._waiting: set[str] = set()

    @property
    def free(self) -> int:
        return self._jobs - len(self._running)

    def start(self, job: Job) -> Mapping[str, Any]:
        self._running.add(job.name)
        self._waiting.add(job.name)
        self._driver.order(job=job.to_dict())
        return {"ray": self._driver.facts["address"], **self._driver.identity}

    def waits(self, name: str) -> bool:
        return name in self._waiting

    def ended(self) -> list[Ended]:
        """Raises SweepError where Ray was lost."""
        ended = []
        for answer in self._driver.answers():
            if "placed" in answer:
                self._waiting.discard(answer["placed"])
            else:
                self._running.remove(answer["ended"])
                self._waiting.discard(answer["ended"])
                ended.append(Ended(answer["ended"], answer["outcome"], answer["error"]))
        return ended

    def kill(self, name: str) -> None:
        self._driver.order(kill=name)

    def close(self) -> None:
        self._driver.close()


class _Driver:
    """The process that speaks with Ray."""

    def __init__(self, address: str, jobs: int, folder: Path, gpus: list[str] | None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(  # noqa: S603 - this Python
            [sys.executable, "-P", "-m", "nbtune.sweep.cluster_driver", address, str(jobs), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment(address), **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus is not None else {})},
            start_new_session=True,  # Ctrl-C in the terminal is the sweep's to answer
            text=True,
            encoding="utf-8",
        )
        self.identity = {"pid": self._process.pid, "created": psutil.Process(self._process.pid).create_time()}
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._failure: dict[str, Any] | None = None
        self._reader = threading.Thread(target=self._read, name="nbtune-ray", daemon=True)
        self._reader.start()
        self.facts = self._greeting(address)

    def _greeting(self, address: str) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=READY_SECONDS)
            if answer == LOST:
                raise SweepError(
                    f"No Ray answers at {address}", self._last_words(), "Start it, or correct the address."
                )
            return self._taken(answer)
        except queue.Empty:
            self.close()
            raise SweepError(f"No Ray answers at {address}", f"Not within {READY_SECONDS:g} s.") from None
        except SweepError:
            self.close()
            raise

    def order(self, **order: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: its last answer tells why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def answers(self) -> list[dict[str, Any]]:
        """What it said since the last question. Raises SweepError where it ended, or says that it has to."""
        if self._failure is not None:
            self._taken(self._failure)
        answers = []
        with suppress(queue.Empty):
            while "title" not in (answer := self._answers.get_nowait()):
                answers.append(answer)
            self._failure = answer  # the next question is answered with it: first, what was said before
        return answers

    def close(self) -> None:
        """End it, and with it all trials."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            kill_family(self._process.pid)
            self._process.wait()
        self._reader.join()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        self._answers.put(LOST)

    def _taken(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "title" in answer:
            raise SweepError(answer["title"], answer["message"] or self._last_words(), answer["remedy"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").strip().splitlines()[-3:])
