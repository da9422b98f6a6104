"""The model, training and review steps: precisions with their memory, presets, undo, reset, and the run as code."""

import html
import importlib
import json
import time

import pytest

import nbtune as nt
from nbtune.notebook import parameters
from nbtune.plan import Plan, plan
from nbtune.presets import PRESETS
from nbtune_widgets import Wizard, _cards

SECONDS = 300  # the first look at a model imports transformers; five plans are traced


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    wizard = Wizard(mlflow=False, max_length=64)
    wizard.wait(SECONDS)
    yield wizard
    wizard.close()


@pytest.fixture
def wizard(shared):
    shared.frame.go(2)  # the method's page reads nothing of its own
    shared.form.load(nt.RunSpec(tracking={"mlflow": False}, training={"max_length": 64}))
    shared.choose_method("LORA")
    shared.wait(SECONDS)
    return shared


def shown(page):
    return html.unescape(page.code.value).removeprefix("<pre>").removesuffix("</pre>")


def a_plan(peak, available, chosen=""):
    return Plan(
        parts={"base weights": peak}, tokens_per_step=1, seconds=None, available_bytes=available, micro_batch_size=1,
        accumulation=1, checkpointed_layers=0, layers=1, packing_length=1, trained_parameters=1, traced=True,
        chosen=chosen)  # fmt: skip


@pytest.mark.parametrize(
    ("peak", "available", "fit"),
    [
        (1.6e9, 23.4e9, ("fits", "fits, 21.80 GB to spare")),
        (9.5e9, 10e9, ("tight", "tight, 0.50 GB to spare")),
        (12e9, 10e9, ("no", "does not fit, 2.00 GB short")),
    ],
)
def test_fits_tight_or_no_and_by_how_much(peak, available, fit):
    assert _cards.fit(a_plan(int(peak), int(available))) == fit
    assert _cards.fit(a_plan(1, 10**10, "micro-batches of 1 x 8 to fit"))[0] == "tight"


def test_each_precision_has_its_memory_and_says_whether_it_fits(wizard):
    wizard.go(0)
    wizard.wait(SECONDS)
    page = wizard.model_page
    sizes = {}
    for name, button in page.precisions.items():
        lines = button.description.split("\n")
        assert lines[0] == name
        assert lines[1].startswith("weights ")
        assert lines[3].startswith(("fits, ", "tight, ", "does not fit, "))
        number, unit = lines[1].split()[1:]
        sizes[name] = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert sizes["32-bit"] == pytest.approx(4 * 134_515_008, rel=0.01)
    assert sizes["16-bit"] == pytest.approx(2 * 134_515_008, rel=0.01)
    assert sizes["16-bit"] > sizes["8-bit"] > sizes["4-bit"] > sizes["4-bit, double"]
    chosen = [name for name, button in page.precisions.items() if "nt-on" in button._dom_classes]
    assert len(chosen) == 1
    page.precisions["4-bit, double"].click()
    wizard.wait(SECONDS)
    assert wizard.spec.model.load_in_4bit
    assert wizard.spec.model.bnb_4bit_use_double_quant
    assert "nt-on" in page.precisions["4-bit, double"]._dom_classes
    assert "nt-on" not in page.precisions[chosen[0]]._dom_classes
    needed = plan(wizard.spec).peak_bytes
    run = page.precisions["4-bit, double"].description.split("\n")[2].split()
    assert float(run[2]) * {"GB": 1e9, "MB": 1e6}[run[3]] == pytest.approx(needed, rel=0.1)  # this process grows


def test_full_training_has_no_quantised_base(wizard):
    wizard.set(method="full")
    wizard.go(0)
    wizard.wait(SECONDS)
    hidden = [name for name, button in wizard.model_page.precisions.items() if button.layout.display == "none"]
    assert hidden == ["8-bit", "4-bit", "4-bit, double"]
    on = [name for name, button in wizard.model_page.precisions.items() if "nt-on" in button._dom_classes]
    assert on == ["32-bit"]  # trained in fp32, cast for the forward pass


def test_models_that_are_here_are_offered(wizard, tmp_path, monkeypatch):
    from nbtune.models import known_models

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"12345678")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"1")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    known = known_models(tmp_path)
    local = {(model.name, model.size) for model in known if model.kind == "local"}
    assert local == {("./mine", 8), ("./small.gguf", 4)}
    wizard.model_page.offer(known, ["smollm2-135m-instruct", "owner/of-a-run"])
    assert next(iter(wizard.model_page.models)) == "smollm2-135m-instruct"
    assert "owner/of-a-run" in wizard.model_page.models
    assert "nt-on" in wizard.model_page.models["smollm2-135m-instruct"]._dom_classes
    wizard.go(2)
    wizard.model_page.models["./mine"].click()
    assert wizard.fields["model.name"].value == "./mine"
    assert "./mine" in wizard.frame.told.value
    wizard.frame.undo.click()
    wizard.wait(SECONDS)
    assert wizard.spec.model.name == "smollm2-135m-instruct"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_set_and_is_undone(wizard, name):
    wizard.go(3)
    before = wizard.spec
    wizard.training_page.presets[name].click()
    wizard.wait(SECONDS)
    assert wizard.spec == before.preset(name)
    told = html.unescape(wizard.frame.told.value)
    for label, old, new in _cards.differences(before, wizard.spec):
        assert f"{label} " in told
        assert f"{old} →" in told
        assert new in told
    assert "nt-on" in wizard.training_page.presets[name]._dom_classes
    wizard.frame.undo.click()
    wizard.wait(SECONDS)
    assert wizard.spec == before
    assert "nt-on" not in wizard.training_page.presets[name]._dom_classes


def test_a_change_by_hand_takes_the_undo_away(wizard):
    wizard.training_page.use("quick look")
    assert wizard.frame._told.layout.display is None
    wizard.fields["training.seed"].control.value = "5"
    assert wizard.frame._told.layout.display == "none"


def test_a_field_goes_back_to_its_default(wizard):
    field = wizard.fields["training.learning_rate"]
    assert field.reset.layout.visibility == "hidden"
    field.control.value = "fast"
    assert field.reset.layout.visibility == "visible"
    assert "0.0002" in field.reset.tooltip
    field.reset.click()
    assert wizard.spec.training.learning_rate == 2e-4
    assert field.reset.layout.visibility == "hidden"


@pytest.mark.parametrize("name", ["QLoRA 4-bit", "DoRA", "LoRA", "AdaLoRA"])
def test_a_card_by_its_common_name_makes_the_settings(wizard, name):
    wizard.method_page.recipes[name].click()
    wizard.wait(SECONDS)
    spec = wizard.spec
    kind = {"AdaLoRA": "ADALORA"}.get(name, "LORA")
    method = {"peft_type": kind, **({"use_dora": True} if name == "DoRA" else {})}
    expected = nt.RunSpec(method=method, training={"max_length": 64}, tracking={"mlflow": False})
    assert spec == expected.updated(load_in_4bit=name == "QLoRA 4-bit")
    on = [name for name, button in wizard.method_page.recipes.items() if "nt-on" in button._dom_classes]
    assert on == [name]


def test_the_review_shows_memory_time_and_the_run_as_code(wizard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBTUNE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in range(400))
    )
    wizard.set(data="rows.jsonl")
    wizard.go(4)
    wizard.wait(SECONDS)
    page = wizard.review_page
    assert "Nothing stands in the way" in page.problems.children[0].value
    assert "to spare" in page.memory.value
    assert "no layer computed again" in page.memory.value
    assert "about " in page.time.value
    from nbtune.data import load_examples
    from nbtune.models import load_tokenizer
    from nbtune.train.schedule import Schedule

    examples = load_examples(wizard.spec.data, load_tokenizer(wizard.spec.model), 64).train
    steps = Schedule(examples, wizard.spec.training).total_steps
    told = int(page.time.value.split("about ")[1].split(" steps")[0].replace(",", ""))
    assert abs(told - steps) <= max(2, 0.1 * steps)

    page.echo.value = "Python"
    names = {}
    exec(shown(page).partition("run = ")[0], names)
    assert names["spec"] == wizard.spec
    page.echo.value = "command"
    assert shown(page).startswith("nbtune train \\\n  --model smollm2-135m-instruct")
    assert page.write_button.layout.display == "none"
    page.echo.value = "YAML"
    (tmp_path / "spec.yaml").write_text(shown(page))
    assert nt.RunSpec.from_yaml(tmp_path / "spec.yaml") == wizard.spec
    page.echo.value = "notebook"
    assert page.write_button.layout.display is None
    page.write_button.click()
    page.write_button.click()
    written = sorted(tmp_path.glob("*.ipynb"))
    assert len(written) == 2
    assert parameters(written[0])["data"] == "rows.jsonl"
    assert written[1].name in page.written.value or written[0].name in page.written.value


def test_rows_in_memory_are_saved_from_the_review(wizard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"<b>{n}</b>", "completion": "x"} for n in range(9)]
    wizard.set(data=rows)
    page = wizard.review_page
    page.echo.value = "command"
    assert "only in this notebook" in page.code.value
    page.save_button.click()
    wizard.wait(SECONDS)
    (path,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert wizard.spec.data.rows is None
    assert wizard.spec.data.source == path.name
    page.echo.value = "Python"


def test_what_does_not_fit_offers_buttons_that_make_it_fit(wizard, monkeypatch):
    wizard.set(max_length=512, per_device_train_batch_size=1)
    planning = importlib.import_module("nbtune.plan")
    monkeypatch.setattr(planning, "_memory", lambda device: (0, 1))  # a machine with little memory
    least = plan(wizard.spec).peak_bytes
    monkeypatch.setattr(planning, "_memory", lambda device: (0, least - 1_000_000))
    wizard.go(4)
    wizard.wait(SECONDS)
    box = next(box for box in wizard.review_page.problems.children if len(getattr(box, "children", ())) > 1)
    labels = [button.description for button in box.children[1:]]
    assert any(label.startswith("shorten to ") for label in labels)
    box.children[1].click()
    wizard.wait(SECONDS)
    assert plan(wizard.spec).fits
    assert "Nothing stands in the way" in wizard.review_page.problems.children[0].value


def test_on_the_screen_within_two_seconds_after_import():
    began = time.perf_counter()
    wizard = Wizard()
    assert time.perf_counter() - began < 2
    wizard.close()
