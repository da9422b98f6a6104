"""PEFT's classes by task, and the classes that find an adapter's base model."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from grid import close, disturb, inputs, outputs
from transformers import BertConfig, PreTrainedTokenizerFast

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.peft import tasks as our_tasks

CLASSES = {
    "llama": ("ForCausalLM", "CAUSAL_LM", ["q_proj"]),
    "gpt2": ("ForCausalLM", "CAUSAL_LM", ["c_attn"]),
    "t5": ("ForSeq2SeqLM", "SEQ_2_SEQ_LM", ["q"]),
    "bert": ("ForSequenceClassification", "SEQ_CLS", ["query"]),
}


def classes(name):
    """Our class, our auto class and PEFT's for one of the tiny models."""
    end = CLASSES[name][0]
    ours = vars(our_tasks)
    return ours[f"PeftModel{end}"], ours[f"AutoPeftModel{end}"], getattr(peft, f"AutoPeftModel{end}")


@pytest.fixture
def adapter(make, tmp_path):
    """`adapter("bert")`: the folder of an adapter, whose base model lies beside it, and its logits."""

    def save(name, **settings):
        make(name).save_pretrained(tmp_path / "base")
        base = type(make(name)).from_pretrained(tmp_path / "base").eval()
        settings = {"task_type": CLASSES[name][1], "target_modules": CLASSES[name][2], **settings}
        model = get_peft_model(base, LoraConfig(**settings))
        disturb(model, 0.1)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", outputs(model.eval(), name)

    return save


@pytest.mark.parametrize("name", CLASSES)
def test_the_base_model_is_found(name, adapter):
    folder, expected = adapter(name)
    kind, auto, theirs = classes(name)
    for finder in (auto, our_tasks.AutoPeftModel):
        model = finder.from_pretrained(folder)
        assert type(model) is kind
        close(outputs(model, name), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(outputs(theirs.from_pretrained(folder).eval(), name), expected)
    trainable = auto.from_pretrained(folder, adapter_name="mine", is_trainable=True)
    assert trainable.active_adapters == ["mine"]
    trainable(**inputs(name)).loss.backward()
    assert all(p.grad is not None for p in trainable.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CLASSES)
def test_a_task_class_gives_its_adapters_the_task(name, make):
    kind, _, _ = classes(name)
    model = kind(make(name), LoraConfig(target_modules=CLASSES[name][2]))
    assert model.peft_config["default"].task_type == CLASSES[name][1]
    assert model.active_adapters == ["default"]
    trained = {key.split(".adapters.")[0] for key, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in key for key in trained) == (name == "bert")
    with pytest.raises(AdapterError, match="FEATURE_EXTRACTION"):
        model.add_adapter("other", LoraConfig(target_modules=CLASSES[name][2], task_type="FEATURE_EXTRACTION"))
    assert list(model.peft_config) == ["default"]
    assert isinstance(model, PeftModel)


def test_without_a_task_the_class_in_the_file_is_used_and_only_one_of_transformers(adapter):
    folder, expected = adapter("llama", task_type=None)
    model = our_tasks.AutoPeftModel.from_pretrained(folder)
    assert type(model) is PeftModel
    close(outputs(model, "llama"), expected)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for library, name in (("os", "system"), ("transformers_evil", "X"), ("transformers", "AutoTokenizer")):
        config["auto_mapping"] = {"parent_library": library, "base_model_class": name}
        path.write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="Unknown base model"):
            our_tasks.AutoPeftModel.from_pretrained(folder)


def test_what_does_not_fit_is_refused_before_a_model_is_read(adapter, monkeypatch):
    folder, _ = adapter("llama")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # nothing may be read
    with pytest.raises(AdapterError, match="CAUSAL_LM"):
        our_tasks.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(str(folder.parent / "base"), "").replace('_path": ""', '_path": null'))
    with pytest.raises(AdapterError, match="Unknown base model"):
        our_tasks.AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AdapterError, match="from_pretrained"):
        our_tasks.AutoPeftModelForCausalLM()


def test_code_that_comes_with_a_model_is_not_run(adapter):
    folder, _ = adapter("llama")
    base, ran = folder.parent / "base", folder.parent / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        our_tasks.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert not ran.exists()


def test_a_larger_tokenizer_beside_the_adapter_makes_the_embeddings_grow(adapter):
    from tokenizers import Tokenizer, models

    folder, expected = adapter("llama")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    model = our_tasks.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.get_base_model().get_input_embeddings().num_embeddings == 100
    close(outputs(model, "llama")[..., :96], expected)


@pytest.mark.parametrize(
    ("end", "base", "head"),
    [
        ("ForTokenClassification", transformers.BertForTokenClassification, "classifier"),
        ("ForQuestionAnswering", transformers.BertForQuestionAnswering, "qa_outputs"),
        ("ForFeatureExtraction", transformers.BertModel, None),
    ],
)
def test_the_other_tasks(end, base, head, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base(BertConfig(vocab_size=96, **sizes)).save_pretrained(tmp_path / "base")
    kind, auto = vars(our_tasks)[f"PeftModel{end}"], vars(our_tasks)[f"AutoPeftModel{end}"]
    model = kind(base.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["query"]))
    disturb(model, 0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    saved = model.peft_config["default"].modules_to_save
    assert (head is None and saved is None) or head in saved
    ids = torch.arange(1, 11)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(peft, f"AutoPeftModel{end}").from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
        close(auto.from_pretrained(tmp_path / "adapter")(input_ids=ids)[0], expected)
        close(theirs(input_ids=ids)[0], expected)
