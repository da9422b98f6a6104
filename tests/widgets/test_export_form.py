"""The form that exports a run, in plain Python: what it offers, what it writes, what it says."""

import dataclasses
import re
import threading

import pytest
import replay
from transformers import AutoModelForCausalLM

from nbtune.peft import IA3Config, PromptTuningConfig
from nbtune_widgets import RunsView, _proof
from nbtune_widgets._after import After
from nbtune_widgets.export import ExportForm

SECONDS = 120  # of a busy machine


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A form in a folder of its own, closed after the test."""
    monkeypatch.chdir(tmp_path)
    opened = []

    def form(run):
        opened.append(ExportForm(run))
        opened[-1].wait(SECONDS)
        return opened[-1]

    yield form
    for form_ in opened:
        form_.close()


@pytest.fixture
def form(make, trained_run, tmp_path):
    return make(trained_run(tmp_path / "runs", "20261122-100000-amber-heron"))


def shown(buttons):
    return [button.description for button in buttons.values() if button.layout.display is None]


def choose(form, *choice):
    form.choose(*choice)
    form.wait(SECONDS)


def export(form):
    form.export_button.click()
    form.wait(SECONDS)
    return form.told.value


def test_precisions_and_the_name_follow_the_format(form, tmp_path):
    assert form.name.value == "amber-heron-adapter"
    assert form._precision_line.layout.display == "none"
    assert str(tmp_path) in form.place.value
    choose(form, "merged")
    assert form.name.value == "amber-heron-merged-bf16"
    assert [text.split(" · ")[0] for text in shown(form.precisions)] == ["bf16", "f16", "f32"]
    choose(form, "gguf")
    size = form._parameters * 2 / 1e6  # MB in f16
    assert f"f16 · {size:.0f} MB" in shown(form.precisions)
    assert len(shown(form.precisions)) == 6
    choose(form, "gguf", "q8_0")
    assert form.name.value == "amber-heron-q8_0.gguf"
    (tmp_path / "amber-heron-q8_0.export.json").touch()  # of one that was made and moved away
    choose(form, "gguf", "q8_0")
    assert form.name.value == "amber-heron-q8_0-2.gguf"
    form.name.value = "mine.gguf"
    choose(form, "gguf", "f16")
    assert form.name.value == "mine.gguf"  # what was typed stays
    assert form.error is None


def test_a_merged_model_with_its_proof(form, tmp_path, capsys):
    choose(form, "merged", "f32")
    seen = []
    form.status.observe(lambda change: seen.append(re.sub("<.*?>", "", change["new"])), names="value")
    form.bar.observe(lambda change: seen.append(change["new"]), names="value")
    said = export(form)
    assert form.error is None
    folder = tmp_path / "amber-heron-merged-f32"
    assert [share for share in seen if isinstance(share, float)] == [0.3, 0.5, 0.75, 1.0]
    assert [text for text in seen if isinstance(text, str)][-4:] == [
        "Asking the adapter in memory", f"Writing {folder}", "Reading it back", ""
    ]  # fmt: skip
    for text in ("48 of 48", "greedy tokens the same", "Read back by transformers", "of 0.001 allowed", str(folder)):
        assert text in said
    assert f"<b>{form.done.proof.largest_difference:.2g}</b>" in said
    assert form.bar.layout.display == "none"
    assert not form.export_button.disabled
    assert capsys.readouterr().out == ""  # it would land under a cell that is long over
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert form.name.value == "amber-heron-merged-f32-2"  # one that is free, for the next

    loading = form.done.loading
    assert loading.count("\n") == 1
    assert loading.splitlines()[0] in said
    found = {}
    exec(loading, found)
    answer = found["chat"]([{"role": "user", "content": "Hello"}], max_new_tokens=4)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_other_formats_load_as_they_say(form, tmp_path):
    choose(form, "gguf-lora")
    assert "lora_path=" in export(form)
    assert "applied by nbtune" in form.told.value
    done = form.done
    whole = dataclasses.replace(done, format="gguf", dtype="q8_0", rounded=done.proof, from_quantised=done.proof)
    said = _proof.proof(whole)
    away = f"{done.proof.relative_difference:.2g}"
    assert f"From the same weights rounded in memory it is {away} away." in said
    assert f"its logits moved by {away} (relative)" in said
    assert f"Llama(&quot;{done.path}&quot;)" in said
    choose(form, "adapter")
    assert "nt.arena(" in export(form)
    assert "AutoPeftModelForCausalLM" in dataclasses.replace(form.done, base="owner/model").loading
    assert form.error is None


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "c\\d", ".."])
def test_a_path_is_refused(name, form, tmp_path):
    before = set(tmp_path.rglob("*"))
    form.name.value = name or " "
    said = export(form)
    assert "is no plain name" in said
    assert "nt-error" in said
    assert "Traceback" not in said
    assert set(tmp_path.rglob("*")) == before


def test_a_name_that_is_taken_and_a_wrong_ending(form, tmp_path):
    (tmp_path / "mine").mkdir()
    form.name.value = "mine"
    assert "exists already" in export(form)
    choose(form, "gguf")
    assert "The file must end in .gguf" in export(form)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_hub_that_cannot_be_reached(form, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert form._hub_line.layout.display == "none"
    form.hub.value = True
    form.wait(SECONDS)
    assert form._hub_line.layout.display is None
    form.repository.value = "no owner"
    assert "is no name of a repository" in export(form)
    assert not (tmp_path / "amber-heron-adapter").exists()
    form.repository.value = "ada/my-model"
    said = export(form)
    assert "whole and proved" in said
    assert "hf upload ada/my-model" in said
    assert (tmp_path / "amber-heron-adapter" / "export.json").exists()


def test_what_a_method_cannot_be(make, tmp_path):
    def buttons(run_id, method):
        form = make(replay.write_run(tmp_path / "runs", run_id, method=method))
        return {name: button.description for name, button in form.formats.items() if button.disabled}

    assert buttons("a", IA3Config()) == {"gguf-lora": "GGUF adapter\nOnly for LoRA"}
    assert set(buttons("b", PromptTuningConfig(num_virtual_tokens=4))) == {"merged", "gguf", "gguf-lora"}
    assert set(buttons("c", "full")) == {"adapter", "gguf-lora"}


def test_a_run_without_weights(make, tmp_path):
    form = make(replay.write_run(tmp_path / "runs", "20261122-100000-amber-heron"))
    assert "has no weights yet" in export(form)
    assert form.bar.layout.display == "none"


def test_what_a_name_holds_is_text(form):
    form.name.value = "<img src=x>"
    export(form)
    assert form.done.path.name == "<img src=x>"
    assert "<img" not in form.told.value
    assert "&lt;img src=x&gt;" in _proof.proof(form.done)


def test_the_table_of_runs_opens_it(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained_run(tmp_path / "runs", "20261122-100000-amber-heron")
    replay.write_run(tmp_path / "runs", "20261122-090000-quiet-otter")
    view = RunsView(tmp_path / "runs")
    try:

        def asked(act):
            act()
            done = threading.Event()
            view._ask(done.set)
            assert done.wait(SECONDS)

        asked(lambda: view.select("20261122-100000-amber-heron", "20261122-090000-quiet-otter"))
        assert view.export_button.layout.display == "none"  # one at a time
        asked(lambda: view.select("20261122-100000-amber-heron"))
        assert view.export_button.layout.display is None
        asked(view.export_button.click)
        assert view.error is None
        view.exporting.wait(SECONDS)
        assert view._opened.children == (view.exporting.widget,)
        assert "48 of 48" in export(view.exporting)
        asked(view.open_button.click)
        assert view.exporting is None
        assert view._opened.children == (view.view.widget,)
    finally:
        view.close()


def test_after_a_run(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    after = After(trained_run(tmp_path / "runs", "20261122-100000-amber-heron"))
    try:
        after.export_button.click()
        after._worker.wait(SECONDS)
        form = after._exporting
        assert after.opened.children == (form.widget,)
        assert after.told.value == ""
        form.wait(SECONDS)
        assert form.name.value == "amber-heron-adapter"
    finally:
        after.close()
