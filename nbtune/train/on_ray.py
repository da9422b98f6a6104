"""The processes of a run as Ray Train's workers: `python -m nbtune.train.on_ray RUN COUNT ADDRESS`.

Ray's driver is a process of its own, which ends with the one that watches the run, and Ray ends the workers with it.
ADDRESS is Ray's, "auto", or "local" for a Ray of this machine that is started and stopped here.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from nbtune._processes import end_with_parent
from nbtune._ray import probe
from nbtune.errors import NbtuneError, RunError
from nbtune.train.launch import FOLDER, report


def main() -> None:
    """Train the run that the command line names; the exit code is 1 where that failed."""
    end_with_parent()
    path, count, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    try:
        fit(path, count, address)
    except NbtuneError as error:
        report(path, None, error, traceback.format_exc(), follows=False)
        sys.exit(1)


def fit(path: Path, count: int, address: str) -> None:
    """Train the run in the folder `path` on `count` workers, one for each GPU where the cluster has so many.

    Raises RunError where Ray cannot be reached, has no room, or a worker failed; a worker leaves its own report.
    """
    try:
        probe(address)
    except (OSError, ValueError) as error:
        raise RunError(f"Ray does not answer at {address}", str(error), "Start it, or correct the address.") from error
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise RunError("Ray is not installed", str(error), "Install nbtune[cluster].") from error

    from nbtune.train.world import patience_seconds

    try:
        if address == "local":
            ray.init(num_cpus=count, include_dashboard=False, log_to_driver=True)
        else:
            ray.init(address, log_to_driver=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"Ray does not answer at {address}", reason, "Start it, or correct the address.") from error
    there = ray.cluster_resources()
    on_gpus = there.get("GPU", 0) >= count
    if not on_gpus and there.get("CPU", 0) < count:
        raise RunError(
            f"Ray has no place for {count} processes",
            f"It has {there.get('GPU', 0):.0f} GPUs and {there.get('CPU', 0):.0f} CPUs.",
            "Lower num_processes, or add machines.",
        )
    trainer = TorchTrainer(
        work,
        train_loop_config={"path": str(path)},
        scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus),
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout_s=int(patience_seconds())),
        run_config=RunConfig(name=path.name, storage_path=str(path / FOLDER / "ray")),
    )
    try:
        trainer.fit()
    except Exception as error:
        remedy = f"The workers print into {path / 'processes.log'}."
        raise RunError("Ray ended the run", str(error).strip().splitlines()[-1], remedy) from error
    finally:
        ray.shutdown()


def work(settings: dict[str, Any]) -> None:
    """A worker's share of the run."""
    from nbtune.train.worker import share

    if share(Path(settings["path"])):
        raise RuntimeError("This process failed; its report is in the run's folder.")


if __name__ == "__main__":
    main()
