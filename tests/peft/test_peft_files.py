"""Files are whole, the same every time, and refused with the reason when they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, logits

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

CONFIG = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def saved(make, tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(make(), CONFIG).save_pretrained(folder)
    return folder


def test_saved_twice_is_the_same_to_the_byte(make, tmp_path):
    torch.manual_seed(3)
    first = get_peft_model(make(), CONFIG.replace(target_modules={"v_proj", "q_proj"}))
    torch.manual_seed(3)
    second = get_peft_model(make(), CONFIG.replace(target_modules={"q_proj", "v_proj"}))
    for name, model in (("first", first), ("again", first), ("second", second)):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", WEIGHTS):
        assert len({(tmp_path / name / file).read_bytes() for name in ("first", "again", "second")}) == 1
    assert list(get_peft_model_state_dict(first)) == sorted(get_peft_model_state_dict(first))


def test_a_file_holds_what_was_trained_and_no_more(saved, base):
    model = PeftModel.from_pretrained(base, saved, is_trainable=True)
    tensors = load_file(saved / WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert sorted(file.name for file in saved.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_saving_over_an_older_adapter_leaves_other_files_alone(saved, base, ids):
    (saved / "notes.txt").write_text("mine")
    model = get_peft_model(base, CONFIG.replace(r=2)).eval()
    model.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved), ids), logits(model, ids))


def test_several_adapters_are_saved_in_folders_of_their_names(base, make, ids, tmp_path):
    model = get_peft_model(base, CONFIG)
    model.add_adapter("other", CONFIG.replace(r=2))
    model.save_pretrained(tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["adapter_config.json", WEIGHTS, "other"]
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "all" / "other")
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["other"]
    with pytest.raises(AdapterError, match="Adapters inside it: other"):
        PeftModel.from_pretrained(make(), tmp_path / "one")


def test_a_loaded_adapter_is_frozen_and_says_so(saved, make, ids):
    frozen = PeftModel.from_pretrained(make(), saved)
    assert not frozen.training
    assert frozen.get_nb_trainable_parameters()[0] == 0
    with pytest.warns(UserWarning, match="is frozen: training it changes nothing"):
        frozen.train()
    trainable = PeftModel.from_pretrained(make(), saved, is_trainable=True)
    trainable.train()
    trainable(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters() if parameter.requires_grad)


def test_loading_again_replaces_and_another_name_adds(saved, base, ids):
    model = PeftModel.from_pretrained(base, saved)
    first = logits(model, ids)
    model = PeftModel.from_pretrained(base, saved)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(saved, "b")
    assert model.active_adapters == ["default"]
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), first)
    model.load_adapter(saved, "b")
    assert list(model.peft_config) == ["default", "b"]
    assert model.active_adapters == ["b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(KEY), rf"Missing \(1\):\n  {KEY}"),
        (lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].clone()}), r"Unexpected \(1\):\n  .*k_proj"),
        (lambda t: t.update({KEY: t[KEY][:2].clone()}), rf"{KEY}: \[2, 32\] in the file, \[4, 32\] in the model"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(saved, base, make, ids, damage, message):
    tensors = load_file(saved / WEIGHTS)
    damage(tensors)
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(base, ids), logits(make(), ids))
    assert base.state_dict().keys() == make().state_dict().keys()


def test_not_strict_loads_what_fits_and_reports_the_rest(saved, base):
    tensors = load_file(saved / WEIGHTS)
    tensors["strange"] = tensors.pop(KEY)
    save_file(tensors, saved / WEIGHTS)
    model = PeftModel.from_pretrained(base, saved, strict=False)
    result = model.load_adapter(saved, "b", strict=False)
    assert result == ([KEY], ["strange"])


def test_another_model_is_refused(saved):
    with pytest.raises(AdapterError, match=r"Missing \(4\)"):  # a block more than the adapter knows
        PeftModel.from_pretrained(llama(num_hidden_layers=4), saved)
    wide = llama()
    for block in wide.model.layers:
        block.self_attn.q_proj = torch.nn.Linear(40, 40)
    with pytest.raises(AdapterError, match=r"Wrong shape \(6\)"):
        PeftModel.from_pretrained(wide, saved)


def test_a_file_cut_off_is_refused(saved, base):
    data = (saved / WEIGHTS).read_bytes()
    for end in (len(data) - 7, 20, 0):
        (saved / WEIGHTS).write_bytes(data[:end])
        with pytest.raises(AdapterError, match=f"Unreadable weights\n.*{WEIGHTS}"):
            PeftModel.from_pretrained(base, saved)


def test_a_pickle_is_refused_with_the_way_to_convert_it(saved, base):
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        PeftModel.from_pretrained(base, saved)
    torch.save(tensors, saved / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"is a pickle[^\n]*\n.*weights_only=True.*save_file|save_file.*weights_only=True"
    ):
        PeftModel.from_pretrained(base, saved)


def test_an_adapter_of_an_unknown_method_is_refused_by_name(saved, base):
    values = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**values, "peft_type": "SHINY"}))
    with pytest.raises(AdapterError, match="'SHINY'"):
        PeftModel.from_pretrained(base, saved)


def test_a_hub_id_is_downloaded(saved, base, ids, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["revision"]))
        if repository == "someone/adapter":
            return str(saved)
        raise OSError("404: no such repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = PeftModel.from_pretrained(base, "someone/adapter", revision="v1")
    assert asked == [("someone/adapter", "v1")]
    assert logits(model, ids).shape == (3, 11, 96)
    with pytest.raises(AdapterError, match="404"):
        PeftModel.from_pretrained(base, "someone/else")


def test_saving_nothing_or_a_pickle_or_onto_a_file_is_refused(base, tmp_path):
    model = get_peft_model(base, CONFIG)
    with pytest.raises(AdapterError, match="safetensors only"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        model.save_pretrained(tmp_path / "a", selected_adapters=["b"])
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="has no adapter"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_state_dicts_go_in_and_out(base, ids):
    model = get_peft_model(base, CONFIG).eval()
    before, kept = logits(model, ids), {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    model.add_adapter("b", CONFIG)
    set_peft_model_state_dict(model, kept, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(AdapterError, match="Missing"):
        set_peft_model_state_dict(model, {}, "b")
    assert set_peft_model_state_dict(model, {}, "b", strict=False).missing_keys == sorted(kept)
