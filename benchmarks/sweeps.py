"""Twelve trials of the real 135M model, two at a time, here and on Ray; the sweep is killed on the way, and goes on.

    uv run python benchmarks/sweeps.py local --out /tmp/sweeps     # some minutes on two cores
    uv run python benchmarks/sweeps.py ray --out /tmp/sweeps
    uv run python benchmarks/sweeps.py compare --out /tmp/sweeps   # the same table, apart from times

Rank, learning rate and method of `notebooks/train.ipynb`, two steps of a few short rows. One trial's notebook raises,
another's kernel is killed. When five trials have ended, the sweep's process is killed with SIGKILL and called again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

import nbtune as nt
from nbtune.notebook import packaged
from nbtune.sweep.ledger import Ledger

SPACE = {"method": ["lora", "hira", "loha"], "r": [4, 8], "learning_rate": [3e-4, 1e-3]}
CRASHES, IS_KILLED = ("lora", 8, 1e-3), ("loha", 4, 3e-4)  # trials 4 and 9
KILLED_AFTER = 5  # trials
OF_TIME = ("seconds", "train_seconds", "train_tokens_per_second", "measured_peak_bytes", "attempts", "run")
TROUBLE = f"""
import os, signal
if (method, r, learning_rate) == {CRASHES}:
    raise RuntimeError("made to crash")
if (method, r, learning_rate) == {IS_KILLED}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def prepare(out: Path) -> dict[str, Any]:
    """The notebook, the rows, and the arguments of the call."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(24)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    book = nbformat.read(packaged("train.ipynb"), as_version=4)
    book.cells.insert(2, nbformat.v4.new_code_cell(TROUBLE, id="trouble"))
    nbformat.write(book, out / "train.ipynb")
    settings = {"eval_fraction": 0.2, "eval_samples": 0, "save_steps": 0}
    params = {"data": str(out / "rows.jsonl"), "max_steps": 2, "max_length": 64, "settings": settings}
    return {"notebook": out / "train.ipynb", "space": SPACE, "params": params, "jobs": 2}


def call(out: Path, where: str) -> None:
    """The sweep itself, in this process."""
    nt.sweep(**prepare(out), out=out / where, ray="local" if where == "ray" else None).wait()


def run(out: Path, where: str) -> None:
    """Call it, kill it, call it again, and say what came of it."""
    command = [sys.executable, __file__, "call", where, "--out", str(out)]
    began = time.monotonic()
    process = subprocess.Popen(command)  # noqa: S603 - this file
    ledger = Ledger(out / where)
    while sum(event["type"] == "end" for event in ledger.events()) < KILLED_AFTER:
        if process.poll() is not None:
            raise SystemExit("The sweep ended by itself.")
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = sum(event["type"] == "end" for event in ledger.events())
    subprocess.run(command, check=True)  # noqa: S603
    events = ledger.events()
    ends = [event["trial"] for event in events if event["type"] == "end"]
    states = [trial.state for trial in ledger.trials().values()]
    told = {
        "where": where,
        "seconds": round(time.monotonic() - began, 1),
        "ended_before_the_kill": before,
        "ended_after_it": len(ends) - before,
        "ended_twice": len(ends) - len(set(ends)),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "reports": sorted(path.name for path in (out / where).glob("???.ipynb")),
    }
    print(json.dumps(told, indent=1))


def table(path: Path) -> list[dict[str, str]]:
    with (path / "table.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in OF_TIME} for row in csv.DictReader(file)]


def compare(out: Path) -> None:
    """Print the table of both; ends with 1 where they differ."""
    local, ray = table(out / "local"), table(out / "ray")
    for row, other in zip(local, ray, strict=True):
        same = {name for name in row if row[name].replace(str(out / "local"), str(out / "ray")) == other[name]}
        shown = [row[name] for name in ("trial", *SPACE, "state", "eval_loss_after", "train_loss")]
        print(*shown, "the same" if same == set(row) else {name: (row[name], other[name]) for name in set(row) - same})
        if same != set(row):
            raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["local", "ray", "compare", "call"])
    parser.add_argument("where", nargs="?", choices=["local", "ray"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.do == "compare":
        compare(given.out.resolve())
    elif given.do == "call":
        call(given.out.resolve(), given.where)
    else:
        run(given.out.resolve(), given.do)
