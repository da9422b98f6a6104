"""A run on Ray's workers: what can be said before Ray is there. benchmarks/processes.py --ray trains on a real one."""

import socket

import pytest

import nbtune as nt
from nbtune.errors import NbtuneError
from nbtune.spec import RunSpec


def test_an_address_where_nobody_listens(tiny_model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    rows = [{"prompt": f"{n}", "completion": "x"} for n in range(8)]
    spec = RunSpec(model=str(tiny_model), data=rows, tracking={"mlflow": False}).updated(num_processes=4)
    run = nt.train(spec, runs_dir=tmp_path, ray=address)  # more processes than this machine may have cores
    with pytest.raises(NbtuneError, match=f"Ray does not answer at {address}"):
        run.wait(120)
    assert run.status == "failed"
    assert "Start it, or correct the address." in run.error
