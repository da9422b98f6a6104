"""The wizard in plain Python: values set, buttons clicked, numbers read. The model is the real one, without weights."""

import threading
import time

import ipywidgets
import pytest
import torch

import nbtune as nt
import nbtune_widgets
from nbtune.errors import RunError
from nbtune.peft.config import PeftType
from nbtune.plan.model import weigh
from nbtune_widgets import Wizard
from nbtune_widgets._worker import Worker
from nbtune_widgets.method import RECIPES

SECONDS = 180  # the first look at a model imports transformers


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One wizard for the tests that only look."""
    wizard = Wizard(mlflow=False)
    wizard.wait(SECONDS)
    yield wizard
    wizard.close()


@pytest.fixture
def wizard(shared):
    shared.form.load(nt.RunSpec(tracking={"mlflow": False}))
    shared.frame.go(2)  # the method's page: the model's plans every precision again
    shared.choose_method("LORA")
    shared.wait(SECONDS)
    return shared


@pytest.fixture
def unplanned(wizard, monkeypatch):
    """Without the plan, which takes seconds for each method and has tests of its own."""
    monkeypatch.setattr(wizard, "_plan", lambda: None)


@pytest.fixture
def runs_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NBTUNE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_it_is_on_the_screen_at_once():
    """What takes longer comes later, from the worker."""
    began = time.perf_counter()
    wizard = Wizard()
    assert time.perf_counter() - began < 2
    assert wizard.spec == nt.RunSpec()
    wizard.close()


def test_it_says_what_the_model_and_the_machine_are(wizard):
    assert wizard.error is None
    facts = wizard.model_page.facts.value
    for text in ("134,515,008", "8,192 tokens", "apache-2.0", "its own", "LlamaForCausalLM"):
        assert text in facts
    for part in ("cores", "GB free", "GPU"):
        assert part in wizard.frame.machine.value
    assert "base weights" in wizard.frame.plan.value


def test_the_map_is_the_models_module_tree(wizard):
    assert list(wizard.picker.kinds) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert wizard.picker.layers.max == 29
    assert "210 of 210 modules · 2,442,240 trainable parameters (1.8 %)" in wizard.picker.summary.value


@pytest.mark.usefixtures("unplanned")
def test_clicks_on_the_map_become_settings_and_numbers(wizard):
    wizard.picker.presets["attention"].click()
    wizard.wait(SECONDS)
    assert wizard.spec.method.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert wizard.spec.method.layers_to_transform is None
    assert "120 of 210 modules · 921,600 trainable" in wizard.picker.summary.value  # 30 x 8 x (4 x 576 + 2 x 768)
    wizard.picker.presets["upper half"].click()
    wizard.picker.kinds["o_proj"].click()
    wizard.wait(SECONDS)
    assert wizard.spec.method.layers_to_transform == list(range(15, 30))
    assert "45 of 210 modules" in wizard.picker.summary.value
    shown = {row["label"]: row["cells"] for row in wizard.picker.map.rows}
    assert shown["q_proj"] == "0" * 15 + "1" * 15
    assert shown["o_proj"] == "0" * 30
    wizard.fields["method.r"].value = 16
    wizard.wait(SECONDS)
    assert "645,120 trainable" in wizard.picker.summary.value  # 15 x 16 x (2 x 576 + 2 x 768)


@pytest.mark.usefixtures("unplanned")
def test_the_map_follows_what_is_typed(wizard):
    wizard.fields["method.target_modules"].control.value = r".*\.(3|4)\.mlp\.up_proj"
    wizard.wait(SECONDS)
    assert "2 of 210 modules" in wizard.picker.summary.value
    assert wizard.picker.layers.value == (3, 4)
    assert wizard.spec.method.target_modules == r".*\.(3|4)\.mlp\.up_proj"


@pytest.mark.usefixtures("unplanned")
def test_a_module_that_is_not_there_is_said_at_the_field(wizard):
    wizard.fields["method.target_modules"].control.value = "q_porj, v_proj"
    wizard.wait(SECONDS)
    assert "q_proj" in wizard.fields["method.target_modules"].error  # the nearest name
    assert wizard.frame.pills[2].description.startswith("! ")
    wizard.fields["method.target_modules"].control.value = "q_proj"
    wizard.wait(SECONDS)
    assert wizard.fields["method.target_modules"].error == ""
    assert not any(pill.description.startswith("! ") for pill in wizard.frame.pills)


@pytest.mark.usefixtures("unplanned")
def test_the_last_kind_cannot_be_taken_away(wizard):
    wizard.fields["method.target_modules"].value = ["q_proj"]
    wizard.wait(SECONDS)
    wizard.picker.kinds["q_proj"].click()
    assert "At least one" in wizard.picker.summary.value
    assert wizard.spec.method.target_modules == ["q_proj"]


@pytest.mark.usefixtures("unplanned")
def test_full_training_has_no_modules_to_pick(wizard):
    wizard.method_page.methods["full"].click()
    wizard.wait(SECONDS)
    assert wizard.spec.method == "full"
    assert wizard.method_page.modules.layout.display == "none"
    wizard.method_page.methods["LORA"].click()
    assert wizard.spec.method == nt.LoraConfig(target_modules="all-linear")


@pytest.mark.parametrize("kind", [*PeftType, "full"])
@pytest.mark.usefixtures("unplanned")
def test_every_method_is_a_card_in_its_family_with_a_form(wizard, kind):
    wizard.method_page.methods[kind].click()
    page = wizard.method_page
    if kind in [recipe.method for recipe in RECIPES]:  # found under its common name
        page.families.value = PeftType(kind).family
    assert page.methods[kind] in page.cards.children
    assert page.families.value == ("full" if kind == "full" else PeftType(kind).family)
    needed = {"C3A": {"block_size": 64}, "VBLORA": {"vector_length": 64}, "TRAINABLE_TOKENS": {"token_indices": [5]}}
    for name, value in needed.get(kind, {}).items():
        wizard.fields[f"method.{name}"].control.value = str(value)
    wizard.wait(SECONDS)
    assert wizard.error is None or wizard.frame.notice.value == ""
    assert not any(field.error for field in wizard.fields.values())
    spec = wizard.spec
    assert spec == nt.RunSpec(method={"peft_type": kind, **needed.get(kind, {})} if kind != "full" else "full",
                              tracking={"mlflow": False})  # fmt: skip
    if kind == "full":
        return
    assert page._fields.children == (wizard.form.method_group.widget,)
    assert f"{weigh(spec, torch.device('cpu')).trained:,} trainable parameters" in wizard.picker.summary.value
    adapts_linears = kind not in ("LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
    assert (wizard.picker.choosing.layout.display is None) == adapts_linears
    assert ("of 210 modules" in wizard.picker.summary.value) == adapts_linears


def test_the_cards_are_in_families(wizard):
    shown = []
    page = wizard.method_page
    for _, family in page.families.options:
        page.families.value = family
        shown += [button.description.partition("\n")[0] for button in page.cards.children]
    common = ["LoRA", "QLoRA 4-bit", "DoRA", "AdaLoRA", "OFT", "IA3"]
    assert shown[: len(common)] == common
    assert len(shown) == len(common) + len(PeftType) + 1
    assert wizard.form.method == "LORA"  # only looked
    assert len({button.description for button in page.methods.values()}) == len(PeftType) + 1


@pytest.mark.usefixtures("unplanned")
def test_a_setting_that_does_not_suit_the_model_is_said_at_its_field(wizard):
    wizard.method_page.methods["C3A"].click()
    wizard.fields["method.block_size"].control.value = "256"  # the default
    wizard.wait(SECONDS)
    field = wizard.fields["method.block_size"]
    assert "does not divide both" in field.error
    assert wizard.frame.pills[2].description.startswith("! ")
    field.control.value = "many"
    wizard.wait(SECONDS)
    assert field.error == "Must be a whole number"
    field.control.value = "64"
    wizard.wait(SECONDS)
    assert field.error == ""
    assert not any(pill.description.startswith("! ") for pill in wizard.frame.pills)
    wizard.method_page.methods["LORA"].click()
    wizard.fields["method.modules_to_save"].control.value = "q_porj"  # an advanced one, folded away
    wizard.wait(SECONDS)
    assert "q_proj" in wizard.fields["method.modules_to_save"].error
    assert wizard.form.method_group._more.layout.display is None


def test_quantisation_changes_the_plan_and_cannot_be_two(wizard):
    whole = wizard.frame.plan.value
    wizard.fields["model.load_in_4bit"].control.value = True
    wizard.wait(SECONDS)
    assert wizard.spec.model.load_in_4bit
    in_4_bits = wizard.frame.plan.value
    assert "base weights" in in_4_bits
    assert in_4_bits != whole
    wizard.fields["model.load_in_8bit"].control.value = True
    wizard.wait(SECONDS)
    assert "choose one" in wizard.fields["model.load_in_4bit"].error
    assert "choose one" in wizard.frame.notice.value
    wizard.fields["model.load_in_4bit"].control.value = False
    wizard.wait(SECONDS)
    assert wizard.frame.notice.value == ""
    assert wizard.frame.plan.value not in (whole, in_4_bits)
    assert wizard.fields["model.load_in_4bit"].error == ""


def test_bad_data_is_said_with_its_remedy_and_forgotten_when_mended(wizard, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    wizard.go(1)
    wizard.fields["data.source"].value = str(path)
    wizard.wait(SECONDS)
    assert "line 2" in wizard.frame.notice.value
    assert wizard.data_page.facts.value == ""
    wizard.fields["data.source"].value = "stdlib-docs"
    wizard.wait(SECONDS)
    assert wizard.frame.notice.value == ""
    assert "held out" in wizard.data_page.facts.value


@pytest.mark.usefixtures("unplanned")
def test_an_unknown_model_is_said(wizard):
    wizard.fields["model.name"].value = "no-such-model"
    wizard.wait(SECONDS)
    assert "no-such-model" in wizard.frame.notice.value
    assert wizard.model_page.facts.value == ""
    wizard.fields["model.name"].value = "smollm2-135m-instruct"
    wizard.wait(SECONDS)
    assert wizard.frame.notice.value == ""
    assert "LlamaForCausalLM" in wizard.model_page.facts.value


def test_review_lists_problems_and_leads_to_the_setting(wizard):
    wizard.set(max_length=100_000)
    wizard.go(4)
    wizard.wait(SECONDS)
    found = wizard.review_page.problems.children
    texts = [box.children[0].value if isinstance(box, ipywidgets.HBox) else box.value for box in found]
    assert any("context of 8192" in text.replace(",", "") for text in texts)
    (button,) = next(box for box in found if isinstance(box, ipywidgets.HBox)).children[1:]
    assert button.description == "shorten to 8,192"
    button.click()
    wizard.wait(SECONDS)
    assert wizard.spec.training.max_length == 8192
    assert "100,000 →" in wizard.frame.told.value
    wizard.frame.undo.click()
    assert wizard.spec.training.max_length == 100_000
    wizard.set(max_length=128)
    wizard.go(4)
    wizard.wait(SECONDS)
    assert "Nothing stands in the way" in wizard.review_page.problems.children[0].value


def test_an_error_of_a_click_is_shown_and_kept(wizard, monkeypatch):
    """Trap 21: nothing may leave a callback."""
    monkeypatch.setattr(wizard.frame, "go", lambda step: 1 / 0)
    wizard.frame.next.click()
    assert "division by zero" in wizard.frame.notice.value
    assert "ZeroDivisionError" in wizard.error
    monkeypatch.undo()
    wizard.fields["training.seed"].value = 1
    assert "division by zero" not in wizard.frame.notice.value


def test_background_work_is_done_on_one_thread(wizard, monkeypatch):
    """Trap 6: a callback may come on any thread; it only asks."""
    seen = []
    monkeypatch.setattr(wizard, "_plan", lambda: seen.append(threading.current_thread().name))
    click = threading.Thread(target=lambda: setattr(wizard.fields["training.max_length"].control, "value", "64"))
    click.start()
    click.join()
    wizard.wait(SECONDS)
    assert seen == ["nbtune-wizard"]


def test_start_shows_the_run_and_refuses_a_second(runs_dir, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(12)]
    wizard = Wizard(data=rows, max_steps=40, max_length=64, r=2, mlflow=False, eval_steps=0, save_steps=0)
    wizard.start_button.click()
    wizard.wait(SECONDS)
    assert wizard.error is None
    assert wizard.run.path.parent == runs_dir
    assert wizard.run.spec.training.max_steps == 40
    assert wizard.view.widget in wizard.frame.run_box.children
    assert wizard.frame.form.layout.display == "none"
    after = wizard.view.after
    assert (after.buttons.layout.display, wizard.run.status) == ("none", "running")
    with pytest.raises(RunError, match="still running"):
        wizard.start()
    deadline = time.monotonic() + SECONDS
    while wizard.run.progress().step < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    wizard.view.stop_button.click()
    assert wizard.run.wait(SECONDS).status == "stopped"
    assert wizard.run.progress().step < 40
    while after.buttons.layout.display is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert wizard.view.charts.outputs
    assert wizard.view.error is None
    wizard.fields["training.max_steps"].value = 7
    after.vary_button.click()
    while wizard.frame.form.layout.display is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert wizard.spec.training.max_steps == 40  # as in the run
    assert wizard.frame.step == 2
    wizard.close()


def test_a_cell_run_again_leaves_no_widgets_behind():
    instances = ipywidgets.widgets.widget._instances

    def shown():
        nbtune_widgets.wizard().wait(SECONDS)  # the map of the model is made of widgets too
        return len(instances)

    first = shown()
    assert shown() == first


def test_worker_does_the_latest_of_one_key_in_order():
    done, go = [], threading.Event()
    worker = Worker("test", lambda text: None, lambda key, error: done.append((key, str(error))))
    worker.ask("first", "", go.wait)
    for number in range(3):
        worker.ask("a", "", lambda number=number: done.append(number))
        worker.ask("b", "", lambda: 1 / 0)
    go.set()
    worker.wait(10)
    assert done == [2, ("b", "division by zero")]
    worker.close()


def test_worker_does_idle_work_last_and_forgets_what_waits():
    done, go = [], threading.Event()
    worker = Worker("test", lambda text: None, lambda key, error: done.append(error))
    worker.ask("first", "", go.wait)
    worker.ask("later", "", lambda: done.append("later"), idle=True)
    worker.ask("soon", "", lambda: done.append("soon"))
    go.set()
    worker.wait(10)
    go.clear()
    worker.ask("first", "", go.wait)
    worker.ask("never", "", lambda: done.append("never"))
    worker.ask("nor this", "", lambda: done.append("nor this"), idle=True)
    worker.forget()
    go.set()
    worker.wait(10)
    assert done == ["soon", "later"]
    worker.close()
