"""What goes to another machine and what comes back, without one: two folders."""

import json
import os

import nbformat
import pytest
from filelock import FileLock, Timeout

from nbtune.errors import SweepError
from nbtune.sweep.inputs import inputs_of, with_paths
from nbtune.sweep.job import Job
from nbtune.sweep.mirror import BUDGET, SMALL, Look, Piece, Receiver, Sender


@pytest.fixture
def there(tmp_path):
    run = tmp_path / "there" / "runs" / "001-amber-heron"
    run.mkdir(parents=True)
    (run / "spec.yaml").write_text(f"data: {tmp_path}/there/rows.jsonl\n")
    return tmp_path / "there"


@pytest.fixture
def pair(there, tmp_path):
    here = tmp_path / "hé re"
    return Sender(there, ["001.ipynb", "runs"], {str(there): str(here)}), Receiver(here), here


def test_lines_come_as_they_are_written_and_only_whole(there, pair):
    sender, receiver, here = pair
    events = here / "runs/001-amber-heron/events.jsonl"
    with (there / "runs/001-amber-heron/events.jsonl").open("a") as log:
        log.write('{"step": 1}\n{"ste')
        log.flush()
        receiver.take(sender.look())
        assert events.read_text() == '{"step": 1}\n'
        log.write('p": 2}\n')
        log.flush()
        look = sender.look()
        assert [piece.data for piece in look.pieces] == [b'{"step": 2}\n']
        receiver.take(look)
        log.write('{"to')
    assert not sender.look().pieces[0].data
    receiver.take(sender.look(final=True))
    assert events.read_text() == '{"step": 1}\n{"step": 2}\n{"to'
    assert not sender.look(final=True).pieces


def test_a_file_that_was_cut_comes_anew(there, pair):
    """As a resumed run does with a line that a kill left half written."""
    sender, receiver, here = pair
    events = there / "runs/001-amber-heron/events.jsonl"
    events.write_text("1\n2\n3\n")
    receiver.take(sender.look())
    os.truncate(events, 2)
    receiver.take(sender.look())
    assert (here / "runs/001-amber-heron/events.jsonl").read_text() == "1\n"


def test_all_of_it_comes_again_where_an_answer_was_lost(there, pair):
    sender, receiver, here = pair
    (there / "runs/001-amber-heron/events.jsonl").write_text("1\n2\n")
    receiver.take(sender.look())
    with (there / "runs/001-amber-heron/events.jsonl").open("a") as log:
        log.write("3\n")
    sender.look()  # lost
    sender.forget()
    receiver.take(sender.look())
    assert (here / "runs/001-amber-heron/events.jsonl").read_text() == "1\n2\n3\n"


def test_paths_are_those_of_here(there, pair):
    sender, receiver, here = pair
    (there / "001.ipynb").write_text(json.dumps({"see": str(there / "x")}))
    receiver.take(sender.look())
    assert (here / "runs/001-amber-heron/spec.yaml").read_text() == f"data: {here}/rows.jsonl\n"
    assert json.loads((here / "001.ipynb").read_text()) == {"see": str(here / "x")}
    assert sender.told(f"See {there}/x.") == f"See {here}/x."


def test_large_files_come_at_the_end_in_chunks_and_whole(there, pair):
    sender, receiver, here = pair
    weights = os.urandom(SMALL) * (BUDGET // SMALL + 1) + b"end"
    (there / "runs/001-amber-heron/adapter").mkdir()
    (there / "runs/001-amber-heron/adapter/weights.safetensors").write_bytes(weights)
    look = sender.look()
    assert [piece.path for piece in look.pieces] == ["runs/001-amber-heron/spec.yaml"]
    receiver.take(look)
    target = here / "runs/001-amber-heron/adapter/weights.safetensors"
    looks = 0
    while (look := sender.look(final=True)).more:
        receiver.take(look)
        looks += 1
        assert not target.exists()
    receiver.take(look)
    assert looks == 1
    assert target.read_bytes() == weights
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_what_is_replaced_or_deleted_there_is_so_here(there, pair):
    sender, receiver, here = pair
    run, same = there / "runs/001-amber-heron", here / "runs/001-amber-heron"
    (run / "summary.json").write_text("{}")
    (run / "about.json").write_text("{}")
    receiver.take(sender.look())
    (run / "about.json").unlink()
    (run / "summary.json").write_text('{"loss": 1}')
    (run / "checkpoints").mkdir()
    receiver.take(sender.look())
    assert sorted(path.name for path in same.iterdir() if path.name != ".lock") == [
        "checkpoints", "spec.yaml", "summary.json"
    ]  # fmt: skip
    assert (same / "summary.json").read_text() == '{"loss": 1}'


def test_locks_wishes_links_and_databases_stay_there(there, pair):
    sender, receiver, here = pair
    run = there / "runs/001-amber-heron"
    for name in (".lock", ".wish", "../mlflow.db", "../mlflow.db-wal"):
        (run / name).touch()
    (run / "mlflow.json").write_text('{"tracking_uri": "sqlite:////there/mlflow.db", "run_id": "x"}')
    (run / "passwords").symlink_to("/etc/passwd")
    receiver.take(sender.look(final=True))
    assert sorted(path.relative_to(here).as_posix() for path in here.rglob("*")) == [
        "runs", "runs/001-amber-heron", "runs/001-amber-heron/.lock", "runs/001-amber-heron/spec.yaml"
    ]  # fmt: skip
    (run / "mlflow.json").write_text('{"tracking_uri": "http://server", "run_id": "x"}')
    receiver.take(sender.look())
    assert (here / "runs/001-amber-heron/mlflow.json").exists()


def test_a_run_is_locked_as_long_as_it_may_go_on(pair):
    sender, receiver, here = pair
    receiver.take(sender.look())
    assert receiver.runs == [here / "runs/001-amber-heron"]
    lock = FileLock(here / "runs/001-amber-heron/.lock")
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    receiver.close()
    with lock.acquire(timeout=0):
        pass


@pytest.mark.parametrize("name", ["../x", "/etc/x", "runs/../../x", "runs\\..\\x"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, name):
    with pytest.raises(SweepError, match="outside"):
        Receiver(tmp_path / "a").take(Look(pieces=[Piece(name, b"", grows=False, first=True)]))


@pytest.fixture
def job(tmp_path):
    cwd, sweep = tmp_path / "cwd", tmp_path / "cwd" / "sweeps" / "a"
    sweep.mkdir(parents=True)
    (cwd / "rows.jsonl").write_text("{}\n")
    (cwd / "more").mkdir()
    (cwd / "more" / "a.md").write_text("a")
    cells = [nbformat.v4.new_code_cell("data = 'rows.jsonl'\nmodel = 'smollm2'\nsettings = {}\nplace = '.'")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), sweep / "notebook.ipynb")
    parameters = {"settings": {"data.mix": [{"source": str(cwd / "more")}]}, "runs_dir": str(sweep / "runs")}
    return Job("001", sweep / "notebook.ipynb", sweep / "001.ipynb", parameters, cwd, {}, sweep / "001.log")


def test_files_and_folders_that_parameters_name_are_shipped(job):
    """Those of the notebook too, wherever they stand; never the folder that it runs in."""
    rows, more = inputs_of(job)
    assert (rows.text, list(rows.files)) == ("rows.jsonl", [""])
    assert (more.path, list(more.files)) == (str(job.cwd / "more"), ["a.md"])
    moved = with_paths(job, {rows.text: "/there/rows.jsonl", more.text: "/there/more"})
    assert moved == {
        "data": "/there/rows.jsonl",
        "settings": {"data.mix": [{"source": "/there/more"}]},
        "runs_dir": job.parameters["runs_dir"],
    }
    assert with_paths(job, {}) == job.parameters


def test_the_same_file_is_read_where_it_is_and_another_is_not(job):
    rows, more = inputs_of(job)
    assert rows.is_here()
    assert more.is_here()
    (job.cwd / "rows.jsonl").write_text("{}\n\n")
    (job.cwd / "more" / "b.md").write_text("b")
    assert not rows.is_here()
    assert not more.is_here()
