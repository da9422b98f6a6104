"""One of the processes of a run: `python -m nbtune.train.worker RUN`, started as torchrun starts its processes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from nbtune._processes import end_with_parent

if TYPE_CHECKING:
    from nbtune.spec import RunSpec
    from nbtune.train.events import Event
    from nbtune.train.world import World


def main() -> None:
    """Train the run that the command line names, together with the others."""
    end_with_parent()
    code = share(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not by way of what torch would still wait for


def share(path: Path) -> int:
    """Do this process's share of the run in the folder `path`; the exit code, and a report of why it is not 0."""
    rank = int(os.environ["RANK"])
    try:
        from nbtune.spec import RunSpec
        from nbtune.train.world import World

        world = World.join()
        work(path, RunSpec.from_yaml(path / "spec.yaml"), world)
        world.leave()
    except BaseException as error:  # noqa: BLE001 - the process that watches the run raises it again
        from nbtune.train.launch import report
        from nbtune.train.world import is_lost_process

        text = traceback.format_exc()
        print(f"Process {rank}: {text}", file=sys.stderr)  # noqa: T201 - into the log of the processes
        report(path, rank, error, text, follows=is_lost_process(error))
        return 1
    return 0


def work(path: Path, spec: RunSpec, world: World) -> None:
    """Do this process's share of the run in the folder `path`; the first process writes what happens."""
    from nbtune.train.control import Control
    from nbtune.train.digest import Journal
    from nbtune.train.session import train_here

    journal, control = Journal(path) if world.is_first else None, Control(path)
    try:
        train_here(
            path,
            spec,
            on_event=_unheard if journal is None else journal,
            should_stop=control.should_stop,
            should_pause=control.should_pause,
            world=world,
        )
    finally:
        if journal is not None:
            journal.close()


def _unheard(event: Event) -> None:
    """What happens in the others happens in the first."""


if __name__ == "__main__":
    main()
