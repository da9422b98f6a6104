"""A sweep before it runs: its notebook is checked, its trials are shown with what they will take."""

import json

import nbformat
import pytest

from nbtune.echo import write_notebook
from nbtune.errors import NbtuneError, SweepError
from nbtune.notebook import NotebookError, packaged
from nbtune.spec import RunSpec
from nbtune.sweep.design import Design
from nbtune.sweep.notebook import SweepNotebook
from nbtune.sweep.preview import Forecaster
from nbtune.sweep.space import Range


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def params(tiny_model, rows):
    return {"model": str(tiny_model), "data": str(rows), "max_steps": 2, "max_length": 64}


def written(path, *sources, tagged=1):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    for cell in book.cells[:tagged]:
        cell.metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return path


def design(space, params=(), path=None, **options):
    return Design(SweepNotebook(path or packaged("train.ipynb")), space, dict(params), **options)


def test_names_are_those_of_the_notebook_and_of_the_settings():
    notebook = SweepNotebook(packaged("train.ipynb"))
    given = {"r": 8, "training.learning_rate": 1e-4, "warmup_ratio": 0.1, "data.seed": 3}
    passed = notebook.parameters(given)
    assert passed == {"r": 8, "learning_rate": 1e-4, "settings": {"warmup_ratio": 0.1, "data.seed": 3}}
    spec = notebook.spec(passed)
    assert (spec.method.r, spec.training.learning_rate, spec.training.warmup_ratio, spec.data.seed) == (8, 1e-4, 0.1, 3)
    assert spec.training.max_steps == 20  # the notebook's own


def test_settings_of_a_call_and_of_the_space_come_together():
    passed = SweepNotebook(packaged("train.ipynb")).parameters({"settings": {"packing": False}, "weight_decay": 0.1})
    assert passed == {"settings": {"packing": False, "weight_decay": 0.1}}


def test_another_method_is_given_what_it_has():
    notebook = SweepNotebook(packaged("train.ipynb"))
    assert notebook.spec(notebook.parameters({"method": "oft"})).method.r == 0
    assert notebook.spec(notebook.parameters({"method": "loha"})).method.r == 16
    assert notebook.spec(notebook.parameters({"method": "ia3"})).method.to_dict().get("r") is None


def test_the_wizards_notebook_can_be_swept(tmp_path, rows):
    spec = RunSpec(data=str(rows), method={"r": 4}, training={"max_steps": 7}).updated(**{"data.eval_fraction": 0.2})
    notebook = SweepNotebook(write_notebook(spec, tmp_path))
    assert notebook.spec({}) == spec
    swept = notebook.spec(notebook.parameters({"r": 8, "eval_fraction": 0.3, "seed": 5, "data.seed": 6}))
    assert (swept.method.r, swept.data.eval_fraction, swept.training.seed, swept.data.seed) == (8, 0.3, 5, 6)


def test_a_notebook_of_another_kind_is_taken_by_its_parameters_alone(tmp_path):
    path = written(tmp_path / "mine.ipynb", "depth = 2", "import my_trainer; my_trainer.go(depth)")
    assert design({"depth": [1, 2]}, path=path).spec({"depth": 1}) is None
    with pytest.raises(NbtuneError, match="no parameter 'r'"):
        design({"r": [4, 8]}, path=path)


@pytest.mark.parametrize(
    ("sources", "tagged", "words"),
    [
        (("r = 4", "import nbtune"), 0, "0 cells tagged"),
        (("r = 4", "s = 4", "import nbtune"), 2, "2 cells tagged"),
        (("r = 4", "import json, os\nprint(r)"), 1, "never trains"),
    ],
)
def test_a_notebook_that_cannot_be_swept_is_refused(tmp_path, sources, tagged, words):
    with pytest.raises(NotebookError, match=words):
        SweepNotebook(written(tmp_path / "a.ipynb", *sources, tagged=tagged))


@pytest.mark.parametrize(
    ("space", "options", "words"),
    [
        ({}, {}, "empty"),
        ({"rr": [4]}, {}, "no setting 'rr'"),
        ({"r": [4, "eight"]}, {}, "of type str"),
        ({"learning_rate": [1e-3, -1.0]}, {}, "greater than 0"),
        ({"weight_decay": [0.0, "much"]}, {}, "valid number"),
        ({"r": Range(-4, 8)}, {}, "r"),
        ({"run_id": ["a", "b"]}, {}, "the sweep's own"),
        ({"r": [4]}, {"params": {"r": 8}}, "varied and fixed"),
        ({"r": [4]}, {"sampler": "anneal"}, "no sampler"),
        ({"r": [4]}, {"metric": "loss"}, "eval_loss_after"),
        ({"seed": [1]}, {"repeats": 2}, "seed"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(space, options, words):
    with pytest.raises(NbtuneError, match=words):
        design(space, **options)


def test_repeats_have_seeds_of_their_own_and_come_after_all_points():
    found = design({"r": [4, 8]}, repeats=2, seed=10)
    assert [(p["r"], p["seed"]) for p in found.points(None)] == [(4, 10), (8, 10), (4, 11), (8, 11)]
    assert len(found.points(3)) == 3
    assert found.parameters(found.points(1)[0]) == {"r": 4, "settings": {"seed": 10}}


def test_a_search_repeats_a_point_before_it_looks_for_the_next():
    found = design({"r": [4, 8]}, sampler="tpe", repeats=2)
    first = found.next_point([])
    again = found.next_point([(first, 2.0)])
    other = found.next_point([(first, 2.0), (again, 2.1)])
    assert (first["r"], first["seed"]) == (again["r"], again["seed"] - 1)
    assert other == {"r": 12 - first["r"], "seed": 0}


def test_a_search_does_not_learn_from_points_outside_its_space():
    found = design({"r": [4, 8]}, sampler="tpe")
    strange = [({"learning_rate": 1e-3}, 1.0), ({"r": 16}, 0.5), ({"r": 4}, 2.0)]
    assert found.next_point(strange) == {"r": 8}


def test_the_preview_foretells_time_and_memory_and_leaves_out_what_is_the_same(params):
    seen = design({"method": ["lora", "ia3"], "r": [4, 8]}, params).preview(Forecaster(None), trials=None, jobs=2)
    forecasts = [forecast for _, forecast in seen.trials]
    assert [forecast.refused for forecast in forecasts] == ["", "", "", "the same as 3"]
    assert forecasts[0].peak_bytes < forecasts[1].peak_bytes
    assert seen.seconds == pytest.approx(sum(forecast.seconds for forecast in forecasts[:3]) / 2)
    assert "3 trials, 2 at a time, 1 refused" in str(seen)
    assert "the same as 3" in str(seen)


def test_trials_that_do_not_fit_are_refused(params):
    small = {**params, "gradient_accumulation_steps": 1}
    sizes = design({"max_length": [64, 256]}, {k: v for k, v in small.items() if k != "max_length"})
    first, second = sizes.preview(Forecaster(None), trials=None, jobs=1).trials
    between = (first[1].peak_bytes + second[1].peak_bytes) // 2
    refused = sizes.preview(Forecaster(between), trials=None, jobs=1)
    assert [bool(forecast.refused) for _, forecast in refused.trials] == [False, True]
    assert "needs" in refused.trials[1][1].refused
    with pytest.raises(SweepError, match="No trial can be run"):
        sizes.preview(Forecaster(1_000_000), trials=None, jobs=1)


def test_the_same_call_has_the_same_folder_and_another_one_has_not(tmp_path):
    one, same = design({"r": [4, 8]}), design({"r": [4, 8]})
    assert one.default_folder() == same.default_folder()
    assert one.default_folder().parts[0] == "sweeps"
    assert one.default_folder() != design({"r": [4, 16]}).default_folder()
    assert one.default_folder() != design({"r": Range(4, 8, 2)}).default_folder()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_has_no_end_needs_a_number_of_trials(sampler):
    with pytest.raises(SweepError, match="trials=20"):
        design({"r": Range(4, 8)}, sampler=sampler).preview(Forecaster(None), trials=None, jobs=1)
