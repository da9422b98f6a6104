"""The process that starts the processes of a run and minds them: `python -m nbtune.train.launcher RUN COUNT`.

It is torchrun for one machine: when one process fails the others are ended, and how each ended is written down.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nbtune._processes import end_with_parent
from nbtune.train.launch import FOLDER, leave_exit_codes

GRACE_SECONDS = 5  # that a process has to end when it is told to; one that hangs is killed then


def main() -> None:
    """Train the run that the command line names; the exit code is 1 where a process failed."""
    end_with_parent()
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=GRACE_SECONDS,
        logs_specs=DefaultLogsSpecs(str(path / FOLDER)),
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "nbtune.train.worker", str(path))
    except ChildFailedError as error:
        leave_exit_codes(path, {rank: failure.exitcode for rank, failure in error.failures.items()})
        sys.exit(1)


if __name__ == "__main__":
    main()
