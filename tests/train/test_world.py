"""Two gloo processes do what one does: the same losses, files and checkpoints; and what one says when another fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nbtune.train import launch
from nbtune.train.events import read_events

GANG = Path(__file__).with_name("gang.py")


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """The folder in which the gang has trained."""
    folder = tmp_path_factory.mktemp("gang")
    # Processes are forked there: OpenMP's threads do not come along.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(GANG), str(tiny_model), str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder


def of(run: Path, kind: str, field: str):
    return [event[field] for event in read_events(run) if event["type"] == kind]


def weights(run: Path, file: str):
    return load_file(run / file)


PAIRS = [
    pytest.param("two", "alone", "adapter/adapter_model.safetensors", id="adapter"),
    pytest.param("sharded-base", "alone", "adapter/adapter_model.safetensors", id="adapter on a sharded base"),
    pytest.param("full-sharded", "full-alone", "model/model.safetensors", id="every weight, sharded"),
]


@pytest.mark.parametrize(("together", "alone", "result"), PAIRS)
def test_as_one_process(runs, together, alone, result):
    """Of three micro-batches a step, with unlike numbers of tokens, one process has two; both have dropout."""
    ours, theirs = runs / together, runs / alone
    assert read_events(ours)[-1]["status"] == "finished"
    assert of(ours, "start", "processes") == [2]
    assert of(ours, "start", "sharded") == [together != "two"]
    assert of(ours, "start", "accumulation") == of(theirs, "start", "accumulation") == [3]
    assert of(ours, "train", "loss") == pytest.approx(of(theirs, "train", "loss"), rel=1e-6)
    assert of(ours, "train", "grad_norm") == pytest.approx(of(theirs, "train", "grad_norm"), rel=1e-4)
    assert of(ours, "train", "supervised_tokens") == of(theirs, "train", "supervised_tokens")
    evals = dict(zip(of(theirs, "eval", "step"), of(theirs, "eval", "eval_loss"), strict=True))
    steps = of(ours, "eval", "step")
    assert steps == ([0, 4] if together == "sharded-base" else [0, 2, 4])
    assert of(ours, "eval", "eval_loss") == pytest.approx([evals[step] for step in steps], rel=1e-6)
    assert len(set(of(ours, "train", "loss"))) == 4
    for file in (result, "checkpoints/step-00000002/weights.safetensors"):
        mine, its = weights(ours, file), weights(theirs, file)
        assert list(mine) == list(its)
        for name in its:
            torch.testing.assert_close(mine[name], its[name], rtol=0, atol=2e-5)
    assert (ours / result).stat().st_size == (theirs / result).stat().st_size
    files = {path.relative_to(runs / alone) for path in theirs.rglob("*") if path.name != ".lock"}
    assert files - {path.relative_to(ours) for path in ours.rglob("*")} == {Path("summary.json")}  # by who watches


def test_a_checkpoint_is_that_of_one_process(runs):
    for together, alone in (("two", "alone"), ("full-sharded", "full-alone")):
        file = "checkpoints/step-00000002/optimizer.safetensors"
        ours, theirs = weights(runs / together, file), weights(runs / alone, file)
        assert list(ours) == list(theirs)
        for name in theirs:
            assert ours[name].shape == theirs[name].shape
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_what_is_sent_is_the_gradients_of_the_adapter(runs):
    adapter = weights(runs / "two", "adapter/adapter_model.safetensors")
    size = sum(tensor.numel() * 4 for tensor in adapter.values())
    assert of(runs / "two", "train", "sent_bytes") == [size] * 4
    assert of(runs / "sharded-base", "train", "sent_bytes") == [size] * 4


def test_sharded_weights_answer_questions(runs):
    steps, samples = of(runs / "sharded-base", "samples", "step"), of(runs / "sharded-base", "samples", "samples")
    assert steps == [0, 4]
    assert all(len(sample) == 1 and sample[0]["prompt"].startswith("Say ") for sample in samples)
    assert not [event for event in read_events(runs / "sharded-base") if event["type"] == "warning"]


def test_sums(runs):
    first, second = (json.loads((runs / f"sums-{rank}.json").read_text()) for rank in range(2))
    assert first == second == {
        "sent": 2 * 15 * 4,  # the third has no gradient anywhere
        "reduced": [[1], [3], [30]],  # as torch's profiler counts: is one missing, which, and the gradients
        "gradients": [[3.0], [7.0], None],
        "values": [[0.0], [0.0], [0.0]],
        "sum": [2.0, 1.0],
        "least": 6,
        "any": [True, False],
        "first_says": [True, False],
        "value": {"rank": 0, "text": "ü"},
    }  # fmt: skip


def test_a_process_that_raises_is_named(runs):
    error = launch.failure(runs / "raises", 2, 1)
    assert str(error).splitlines() == ["ZeroDivisionError: division by zero", "Process 1 of 2 failed."]
    assert "Process 1 of 2:\nTraceback" in error.__notes__[0]
    assert "gang.py" in error.__notes__[0]
    other = json.loads((runs / "raises" / launch.FOLDER / "rank-0.json").read_text())
    assert other["follows"]
    assert other["title"] == "Another process of the run has ended"


def test_a_process_that_hangs_is_not_waited_for(runs):
    first, second = (json.loads((runs / f"hanging-{rank}.json").read_text()) for rank in range(2))
    assert first[:3] == ["RunError", "Process 1 of 2 does not answer", "The others waited 3 s for it."]
    assert second[0] == "LostProcessError"  # it came too late
