"""`nbtune runs`, called in this process."""

import io
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nbtune import cli_runs
from nbtune.cli import app
from nbtune.errors import NbtuneError
from nbtune.run import Run, runs
from tests.widgets.replay import write_run


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, "20261122-100000-amber-heron", 60, seed=0)
    write_run(tmp_path, "20261122-090000-quiet-otter", 40, seed=1, learning_rate=1e-3)
    return tmp_path


def call(folder, *arguments, answer=None):
    done = CliRunner(env={"NBTUNE_RUNS": str(folder)}).invoke(app, ["runs", *arguments], input=answer)
    if isinstance(done.exception, NbtuneError):
        raise done.exception
    return done


def test_the_list_has_curves_and_is_sorted(folder):
    listed = call(folder).output
    assert listed.index("amber-heron") < listed.index("quiet-otter")
    curves = re.findall("[▁▂▃▄▅▆▇█]{12}", listed)
    assert len(curves) == 2
    assert all(curve[0] in "▇█" and curve[-1] in "▁▂▃" for curve in curves)
    by_name = call(folder, "--sort", "name").output
    assert by_name.index("amber-heron") < by_name.index("quiet-otter")
    losses = {run.name: run.summary()["eval_loss_after"] for run in runs(folder)}
    by_loss = call(folder, "--sort", "loss").output
    assert sorted(losses, key=losses.get) == sorted(losses, key=by_loss.index)


TELLING = ["loss", "method", "data", "tokens/s", "peak"]


@pytest.mark.parametrize(("width", "shown"), [(200, TELLING), (100, TELLING[:2]), (70, [])])
def test_a_narrow_terminal_gets_the_telling_columns_whole(folder, monkeypatch, width, shown):
    screen = io.StringIO()
    monkeypatch.setattr(cli_runs, "console", Console(file=screen, width=width, force_terminal=True, no_color=True))
    call(folder)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3
    assert "amber-heron" in lines[1]
    assert re.search(r"\d\.\d{3} → \d\.\d{3}", lines[1])
    assert [column for column in TELLING if column in lines[0]] == shown


def test_names_notes_and_differences(folder):
    call(folder, "rename", "heron", "baseline [1]")
    assert "baseline [1]" in call(folder).output
    call(folder, "note", "baseline [1]", "fine")
    assert call(folder, "note", "heron").output == "fine\n"
    table = call(folder, "diff", "heron", "otter").output
    assert re.search(r"training\.learning_rate +0\.0002 +0\.001", table)
    assert "training.max_steps" in table
    assert len(table.splitlines()) == 3


def test_delete_asks_and_restore_brings_back(folder):
    assert call(folder, "delete", "heron", answer="n\n").exit_code == 1
    assert len(runs(folder)) == 2
    assert "is in" in call(folder, "delete", "heron", answer="y\n").output
    assert [run.name for run in runs(folder)] == ["quiet-otter"]
    with pytest.raises(NbtuneError, match="Known runs"):
        Run.open("heron", runs_dir=folder)
    with pytest.raises(NbtuneError, match="amber-heron"):
        call(folder, "restore", "otter")
    call(folder, "restore", "heron")
    assert len(runs(folder)) == 2
    call(folder, "delete", "heron", "otter", "--yes")
    assert call(folder, "empty-trash", answer="y\n").output.endswith("2 runs deleted for good.\n")
    assert "No runs" in call(folder).output


def test_the_folder_may_stand_before_the_command(folder, tmp_path):
    done = CliRunner().invoke(app, ["runs", "--runs-dir", str(folder), "note", "heron", "kept"])
    assert done.exit_code == 0, done.output
    assert Run.open("heron", runs_dir=folder).about.note == "kept"


def test_a_run_that_has_ended_hears_nothing(folder):
    for wish in ("pause", "stop"):
        assert call(folder, wish, "heron").exit_code == 0
    assert not (Run.open("heron", runs_dir=folder).path / ".wish").exists()
