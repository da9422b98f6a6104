"""A notebook whose run takes no model: the files, the lock and the wishes of a real one, and a loss that it is told."""

import time
from pathlib import Path

import nbformat
import psutil

PATIENCE = 240  # seconds, on a machine that is busy with other things
PARAMETERS = """
loss = 1.0
steps = 3  # of a twentieth of a second each
do = "train"  # or "kill", "hang", "raise", "nothing"
data = ""  # a file to read
wait_for = ""  # a file, until which it hangs after its first step
seed = 0
"""

BODY = """
import os, time
from pathlib import Path
from filelock import FileLock
from nbtune import _files
from nbtune._names import new_id
from nbtune.train.control import Control
from nbtune.train.events import EventLog

def wait():
    while do == "hang" or (wait_for and not Path(wait_for).exists()):
        time.sleep(0.05)

if data:
    print("read", Path(data).read_text(), "inode", Path(data).stat().st_ino)
if do == "raise":
    raise RuntimeError("a cell that fails")
if do == "kill":
    os.kill(os.getpid(), 9)
if do == "hang":
    wait()
if do == "train":
    runs = Path(os.environ["NBTUNE_RUNS"])
    path = runs / new_id(runs)
    path.mkdir(parents=True)
    _files.write_text(path / "spec.yaml", "model: {name: toy}")  # at once, as a real run's: the sweep looks any time
    with FileLock(path / ".lock"):
        log, control, status = EventLog(path), Control(path), "finished"
        log.append({"type": "start", "step": 0, "total_steps": steps, "eval_examples": 1})
        log.append({"type": "eval", "step": 0, "eval_loss": 4.0})
        for step in range(1, steps + 1):
            time.sleep(0.05)
            log.append({"type": "train", "step": step, "loss": loss, "tokens": 8, "tokens_per_second": 160.0,
                        "peak_memory_bytes": 1})
            log.append({"type": "eval", "step": step, "eval_loss": loss})
            wait()
            if control.should_stop():
                status = "stopped"
                break
        (path / "adapter").mkdir()
        log.append({"type": "end", "step": step, "status": status})
    print("threads", os.environ["OMP_NUM_THREADS"])
"""


def write_toy(path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def processes_of(sweep: Path) -> list[psutil.Process]:
    """What still runs of a sweep's trials: workers, kernels, and whatever they started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NBTUNE_RUNS") == str(sweep / "runs") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def eventually(condition, what):
    """The value of a condition, once it has one."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.2)
    return value
