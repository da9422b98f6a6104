"""The wizard's Sweep step in plain Python: values typed, trials foretold. The real model, without weights."""

import inspect

import pytest

import nbtune as nt
from nbtune.sweep.preview import Forecaster
from nbtune_widgets import Wizard
from nbtune_widgets.specform import FormError
from nbtune_widgets.sweeppage import Options

SECONDS = 240
STEP = 5


@pytest.fixture(scope="module")
def shared():
    wizard = Wizard(mlflow=False, max_steps=20, max_length=64)
    wizard.wait(SECONDS)
    wizard.go(STEP)
    wizard.wait(SECONDS)
    yield wizard
    wizard.close()


@pytest.fixture
def page(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = shared.sweep_page
    for varied in found.varied.values():
        varied.control.value = ""
    for option in found.options.values():
        option.set_default()
    shared.wait(SECONDS)
    return found


def rows(page):
    return page.trials.value.count("<tr>")


def test_every_sweepable_setting_of_the_method_has_a_line_that_says_its_value(shared, page):
    sweepable = [found.path for found in nt.settings(nt.LoraConfig()) if found.sweepable]
    assert sorted(page.varied) == sorted(sweepable)
    assert page.varied["training.max_length"].control.placeholder == "64"
    assert "Nothing is varied yet" in page.trials.value
    assert page.run_button.disabled
    assert shared.start_button.layout.display == "none"


def test_the_trials_are_foretold(shared, page):
    page.set(r="4, 8", learning_rate="1e-4..1e-3 log 3")
    shared.wait(SECONDS)
    assert page.space == {"r": [4, 8], "learning_rate": nt.Range(1e-4, 1e-3, n=3, log=True)}
    html = page.trials.value
    assert "6 trials, 1 at a time, about " in html
    assert html.count("<td>8</td>") == 3
    assert html.count(" GB</td>") + html.count(" MB</td>") == 6
    assert "0.0003162" in html
    assert not page.run_button.disabled
    page.options["trials"].value = 4
    page.options["jobs"].value = 2
    shared.wait(SECONDS)
    assert "4 trials, 2 at a time" in page.trials.value
    page.set(r="8, 8")
    shared.wait(SECONDS)
    assert "r has a value twice" in page.trials.value
    assert page.run_button.disabled


def test_trials_that_do_not_fit_are_refused_with_the_reason(shared, page, monkeypatch):
    monkeypatch.setattr(page, "_forecaster", lambda *_: Forecaster(memory_bytes=1_500_000_000))
    page.set(r="4, 512")
    shared.wait(SECONDS)
    assert "1 trial, 1 at a time, 1 refused" in page.trials.value
    assert "refused: needs " in page.trials.value


@pytest.mark.parametrize(
    ("name", "typed", "reason"),
    [
        ("learning_rate", "1e-4, 7", "Must be less than 1"),
        ("r", "4, many", "Must be a whole number"),
        ("r", "4..", "Must be a whole number"),
        ("max_steps", "9..3 2", "is empty"),
        ("lr_scheduler_type", "linear, sine", "Must be &#x27;linear&#x27;"),
    ],
)
def test_what_is_no_value_is_said_at_the_field(shared, page, name, typed, reason):
    page.set(**{name: typed})
    shared.wait(SECONDS)
    (wrong,) = [varied for varied in page.varied.values() if varied.error]
    assert wrong.field.setting.name == name
    assert reason in wrong._help.value
    assert "nt-bad" in wrong.control._dom_classes
    assert wrong.field.setting.label in page.trials.value
    assert page.run_button.disabled
    with pytest.raises(FormError):
        page.run()
    page.set(**{name: ""})
    shared.wait(SECONDS)
    assert wrong.error == ""


def test_a_sampler_needs_a_number_of_trials(shared, page):
    page.set(learning_rate="1e-4..1e-3 log")
    shared.wait(SECONDS)
    assert "A grid cannot try every number" in page.trials.value
    page.options["sampler"].value = "tpe"
    shared.wait(SECONDS)
    assert "Say how many trials there are to be" in page.trials.value
    page.options["trials"].value = 5
    shared.wait(SECONDS)
    assert "5 trials, 1 at a time, 5 of them chosen as results come in" in page.trials.value
    page.options["trials"].control.value = "0"
    shared.wait(SECONDS)
    assert "Trials: Must be greater than or equal to 1" in page.trials.value


def test_another_method_has_other_settings_and_what_was_typed_stays(shared, page):
    page.set(learning_rate="1e-4, 2e-4")
    shared.choose_method("VBLORA")
    shared.wait(SECONDS)
    assert "method.topk" in page.varied
    assert page.varied["training.learning_rate"].control.value == "1e-4, 2e-4"
    shared.choose_method("LORA")
    shared.wait(SECONDS)
    assert "method.topk" not in page.varied


def test_rows_that_are_only_here_must_be_saved_first(shared, page):
    page.set(r="4, 8")
    shared.set(data=[{"prompt": "a", "completion": "b"}])
    shared.wait(SECONDS)
    assert "The rows are only in this notebook" in page.trials.value
    shared.set(data="stdlib-docs")
    shared.wait(SECONDS)


def test_the_notebook_is_written_once(page, tmp_path):
    spec = page._form.spec
    first = page._notebook(spec)
    assert page._notebook(spec) == first
    assert page._notebook(spec.updated(max_steps=7)) != first
    assert [file.name for file in sorted(tmp_path.glob("*.ipynb"))] == [
        "train-lora-smollm2-135m-instruct-2.ipynb", "train-lora-smollm2-135m-instruct.ipynb",
    ]  # fmt: skip


def test_the_options_are_those_of_a_sweep():
    sweep = inspect.signature(nt.sweep).parameters
    plain = Options().arguments
    assert {name: value for name, value in plain.items() if value != sweep[name].default} == {}
    asked = Options(first=20, factor=4, together="always", sampler="tpe", trials=9).arguments
    assert (asked["halving"].first, asked["halving"].factor, asked["together"], asked["trials"]) == (20, 4, True, 9)
    assert Options(together="auto").arguments["together"] == "auto"
