"""A run on processes that torchrun starts, on one machine or on several.

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m nbtune.torchrun spec.yaml --runs-dir /shared/runs

The same command on every machine. The model and the data must be found under the same names on all of them; the folder
of the runs is written by the first process, and read by all when a run is resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune.errors import NbtuneError, RunError

if TYPE_CHECKING:
    from nbtune.run import Run
    from nbtune.train.world import World


def main() -> None:
    """Train the spec, or go on with the run, that the command line names."""
    parser = argparse.ArgumentParser(prog="torchrun -m nbtune.torchrun", description="A run on torchrun's processes.")
    parser.add_argument("what", help="a run's settings (spec.yaml), or the folder of a run to go on with")
    parser.add_argument("--runs-dir", type=Path, help="folder of the runs; default ./runs")
    parser.add_argument("--run-id", help="name of the run's folder")
    given = parser.parse_args()
    from nbtune.train.world import World

    world = World.join()
    try:
        train_share(world, Path(given.what), given.runs_dir, given.run_id)
    except NbtuneError as error:
        print(f"process {world.rank} of {world.size}: {error}", file=sys.stderr)  # noqa: T201 - a command
        sys.exit(1)
    world.leave()


def train_share(world: World, what: Path, runs_dir: Path | None = None, run_id: str | None = None) -> None:
    """Do this process's share of a run: of the spec in the file `what`, or of the run in the folder `what`.

    The first process makes the run's folder, writes what happens there, and raises what goes wrong.
    """
    from nbtune.spec import RunSpec
    from nbtune.train.worker import work

    run = opened(what, runs_dir, run_id, world.size) if world.is_first else None
    known = world.value_of_first(lambda: None if run is None else {"path": str(run.path), "spec": run.spec.to_dict()})
    if run is not None:
        run.train_here(world)
    else:
        work(Path(known["path"]), RunSpec.from_dict(known["spec"]), world)


def opened(what: Path, runs_dir: Path | None, run_id: str | None, processes: int) -> Run:
    """The run in the folder `what`, or a new one of the spec in the file `what`, for so many processes."""
    from nbtune.check import require
    from nbtune.run import Run
    from nbtune.spec import RunSpec

    if what.is_dir():
        run = Run.at(what)
        if run.status == "finished":
            raise RunError(f"{run.id} is finished", "", "Train a new one of its spec.yaml.")
        run.spec = run.spec.updated(num_processes=processes)
        return run
    spec = RunSpec.from_yaml(what)
    require(spec.updated(num_processes=1), runs_dir=runs_dir)  # where the processes are is torchrun's affair
    return Run.create(spec.updated(num_processes=processes), runs_dir=runs_dir, run_id=run_id)


if __name__ == "__main__":
    main()
