"""Prompt tuning, prefix tuning and P-tuning against `peft`, on decoders, an encoder, and both."""

from __future__ import annotations

import json
import warnings
from typing import Any, ClassVar

import peft
import pytest
import safetensors.torch
import torch
from grid import close, disturb, inputs, losses, outputs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from nbtune.peft.config import PeftConfig
from nbtune.peft.configs.prompts import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
CONFIGS = [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def task(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": 5, "task_type": TASKS[name], **settings}


def padded(name: str) -> dict[str, torch.Tensor]:
    """The batch with a row that is padded on the left, and one on the right where no text is written after it."""
    batch = inputs(name)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    if name in ("bert", "t5"):
        mask[1, -2:] = 0
    return {**batch, "attention_mask": mask}


class PromptTests:
    """What must be true of every method that trains a prompt."""

    config: ClassVar[type[PeftConfig]]
    oracle: ClassVar[type[peft.PeftConfig]]
    settings: ClassVar[list[dict[str, Any]]] = [{}]

    def pytest_generate_tests(self, metafunc):
        """Each test on each model, with each of the settings."""
        if "name" in metafunc.fixturenames:
            both = [(name, settings) for settings in self.settings for name in TASKS]
            ids = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in both]
            metafunc.parametrize(("name", "settings"), both, ids=ids)

    def ours(self, make, name, settings, adapter="default") -> PeftModel:
        model = get_peft_model(make(name), self.config(**task(name, settings)), adapter)
        disturb(model, 1.0)
        return model.eval()

    def theirs(self, make, name, settings) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(make(name), self.oracle(**task(name, settings)))
        disturb(model, 1.0)
        return model.eval()

    def test_files_go_both_ways(self, make, name, settings, tmp_path):
        ours, theirs = self.ours(make, name, settings), self.theirs(make, name, settings)
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        in_peft = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
        here = PeftModel.from_pretrained(make(name), tmp_path / "theirs")
        for batch in (inputs(name), padded(name)):
            with torch.no_grad():
                close(ours(**batch).logits, in_peft(**batch).logits)
                close(here(**batch).logits, theirs(**batch).logits)
                close(here(**batch).loss, theirs(**batch).loss)
        base = outputs(make(name), name)
        assert (outputs(ours, name)[:, -base.shape[1] :] - base).abs().max() > 1e-3

    def test_the_config_file_says_what_peft_says(self, make, name, settings, tmp_path):
        self.ours(make, name, settings).save_pretrained(tmp_path / "ours")
        self.theirs(make, name, settings).save_pretrained(tmp_path / "theirs")
        ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
        assert ours.keys() - theirs.keys() == set()
        if name == "bert":  # PEFT writes each head twice
            assert sorted(ours.pop("modules_to_save")) == sorted(set(theirs.pop("modules_to_save")))
        theirs.pop("peft_version")
        assert {key: ours.get(key, "absent") for key in theirs} == theirs

    def test_ten_steps_give_the_losses_of_peft(self, make, name, settings):
        theirs, ours = self.theirs(make, name, settings), self.ours(make, name, settings)
        copy_parameters(theirs, ours)
        mine, expected = losses(ours, name, 1e-2), losses(theirs, name, 1e-2)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
        assert mine[-1] < mine[0]

    def test_training_goes_on_from_a_file(self, make, name, settings, tmp_path):
        self.ours(make, name, settings).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(name), tmp_path, is_trainable=True)
        seen = losses(loaded, name, 1e-2)
        assert seen[-1] < seen[0]
        embedding = next(p for n, p in loaded.named_parameters() if n.endswith("default.embedding"))
        loaded.save_pretrained(tmp_path / "again")
        stored = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(stored, embedding)

    @pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
    def test_generation_is_that_of_peft(self, make, name, settings, how, tmp_path):
        if name == "bert":
            return  # writes no text
        ours = self.ours(make, name, settings)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
        ids = inputs(name)["input_ids"]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, **GREEDY}
        mine = ours.generate(**batch, **how)
        if how == {"use_cache": False}:  # which PEFT gets wrong with a prefix
            assert torch.equal(mine, ours.generate(**batch))
        else:
            assert torch.equal(mine, theirs.generate(**batch, **how))
        if not how:
            assert torch.equal(mine, ours.generate(ids, pad_token_id=0, **GREEDY))
            scores = {"output_logits": True, "return_dict_in_generate": True}
            first, base = (model.generate(**batch, **scores).logits[0] for model in (ours, make(name)))
            assert (first - base).abs().max() > 1e-3

    def test_a_row_padded_on_the_left_writes_what_it_would_alone(self, make, name, settings):
        if name == "bert":
            return
        ours, ids = self.ours(make, name, settings), inputs(name)["input_ids"][:2].clone()
        alone = ours.generate(input_ids=ids[:1, 4:], pad_token_id=0, **GREEDY)[0]
        ids[0, :4] = 0
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        if name == "t5":  # its positions are relative and begin at the first token, padded or not
            ids[0], mask[0] = ids[0].roll(-4), mask[0].roll(-4)
        both = ours.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **GREEDY)[0]
        assert torch.equal(both[-8:], alone[-8:])

    def test_disabled_and_unloaded_are_the_base(self, make, name, settings):
        ours, base = self.ours(make, name, settings), make(name)
        with ours.disable_adapter():
            assert torch.equal(outputs(ours, name), outputs(base, name))
        assert outputs(ours, name).shape != outputs(base, name).shape or not torch.equal(
            outputs(ours, name), outputs(base, name)
        )
        plain = ours.unload()
        assert plain.state_dict().keys() == base.state_dict().keys()
        assert torch.equal(outputs(plain, name), outputs(base, name))
        assert not any(module._forward_pre_hooks for module in plain.modules())

    def test_only_the_prompt_gets_gradients(self, make, name, settings):
        ours = self.ours(make, name, settings).train()
        ours(**inputs(name)).loss.backward()
        for key, parameter in ours.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad == (".adapters." in key), key

    def test_a_prompt_cannot_be_merged(self, make, name, settings):
        ours = self.ours(make, name, settings)
        before = outputs(ours, name)
        with pytest.raises(AdapterError, match="cannot be merged"):
            ours.merge_and_unload()
        assert torch.equal(outputs(ours, name), before)

    def test_each_row_has_its_prompt(self, make, name, settings):
        ours = self.ours(make, name, settings, "a")
        ours.add_adapter("b", self.config(**task(name, settings)))
        expected = {}
        for adapter in ("a", "b"):
            ours.set_adapter(adapter)
            expected[adapter] = outputs(ours, name)
        mixed = outputs(ours, name, adapter_names=["b", "a", "a", "b"])
        close(mixed, torch.stack([expected[adapter][row] for row, adapter in enumerate("baab")]))
        if name != "bert":
            batch = {"input_ids": inputs(name)["input_ids"], "pad_token_id": 0, "num_beams": 2, **GREEDY}
            ours.set_adapter("a")
            alone = ours.generate(**batch)
            assert torch.equal(ours.generate(**batch, adapter_names=["b", "a", "a", "b"])[1:3], alone[1:3])
        with pytest.raises(AdapterError, match="Rows with different prompts"):
            ours(**inputs(name), adapter_names=["b", "a", "__base__", "b"])
        ours.set_adapter(["a", "b"])
        with pytest.raises(AdapterError, match="More than one prompt"):
            ours(**inputs(name))

    def test_saving_twice_gives_the_same_bytes(self, make, name, settings, tmp_path):
        ours = self.ours(make, name, settings)
        ours.save_pretrained(tmp_path / "once")
        loaded = PeftModel.from_pretrained(make(name), tmp_path / "once")
        close(outputs(loaded, name), outputs(ours, name))
        loaded.save_pretrained(tmp_path / "twice")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
        stored = safetensors.torch.load_file(tmp_path / "once" / "adapter_model.safetensors")
        heads = {"base_model.classifier.weight", "base_model.classifier.bias"} if name == "bert" else set()
        assert stored.keys() == {"prompt_embeddings", *heads}

    def test_on_the_meta_device_it_has_the_same_shapes(self, make, name, settings):
        config = self.config(**task(name, settings))
        models = [get_peft_model(model, config) for model in (make(name), make(name).to("meta"))]
        real, meta = ({key: value.shape for key, value in get_peft_model_state_dict(model).items()} for model in models)
        assert real == meta
        assert models[0].get_nb_trainable_parameters()[0] == models[1].get_nb_trainable_parameters()[0]

    def test_a_bfloat16_base_stays_bfloat16(self, make, name, settings):
        ours = get_peft_model(make(name).to(torch.bfloat16), self.config(**task(name, settings))).train()
        result = ours(**padded(name))
        assert result.logits.dtype is torch.bfloat16
        result.loss.backward()
        gradients = [p.grad for p in ours.parameters() if p.requires_grad]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        if name != "bert":
            ours.eval().generate(input_ids=inputs(name)["input_ids"], pad_token_id=0, **GREEDY)


def copy_parameters(source: nn.Module, target: PeftModel) -> None:
    """Give our adapter, encoder included, the values of PEFT's, whose parameters come in the same order."""
    prompts = [p for n, p in source.named_parameters() if "prompt_encoder" in n]
    heads = [p for n, p in source.named_parameters() if "modules_to_save" in n]
    mine = [p for n, p in target.named_parameters() if ".adapters." in n and ".module." not in n]
    saved = [p for n, p in target.named_parameters() if ".adapters." in n and ".module." in n]
    with torch.no_grad():
        for a, b in [*zip(mine, prompts, strict=True), *zip(saved, heads, strict=True)]:
            a.copy_(b)


class TestPromptTuning(PromptTests):
    config, oracle = PromptTuningConfig, peft.PromptTuningConfig


class TestPrefixTuning(PromptTests):
    config, oracle = PrefixTuningConfig, peft.PrefixTuningConfig
    settings: ClassVar = [{}, {"prefix_projection": True, "encoder_hidden_size": 24}]


class TestPTuning(PromptTests):
    config, oracle = PromptEncoderConfig, peft.PromptEncoderConfig
    settings: ClassVar = [{}, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_bert(kind):
    torch.manual_seed(3)
    return kind(BertConfig(vocab_size=96, max_position_embeddings=64, **SIZES)).eval()


def prompted(model, config, settings=None):
    ours = get_peft_model(model, config(num_virtual_tokens=5, **(settings or {})))
    disturb(ours, 1.0)
    return ours.eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_features_are_those_of_peft(config, tmp_path):
    ours = prompted(small_bert(BertModel), config, {"task_type": "FEATURE_EXTRACTION"})
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_bert(BertModel), tmp_path).eval()
    batch = {key: value for key, value in padded("bert").items() if key != "labels"}
    with torch.no_grad():
        close(ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state)


def test_labels_of_tokens_begin_after_the_prompt(ids):
    """With PEFT 0.21.2 this loss raises, as there are more logits than labels."""
    ours = prompted(small_bert(BertForTokenClassification), PromptTuningConfig, {"task_type": "TOKEN_CLS"})
    with torch.no_grad():
        result = ours(ids, labels=ids % 2)
    assert result.logits.shape == (3, 16, 2)
    expected = nn.functional.cross_entropy(result.logits[:, 5:].flatten(0, 1), (ids % 2).flatten())
    close(result.loss, expected)


def test_answers_to_questions_are_counted_after_the_prompt(ids):
    """PEFT 0.21.2 trains on positions that are off by the prompt's length."""
    ours = prompted(small_bert(BertForQuestionAnswering), PromptTuningConfig, {"task_type": "QUESTION_ANS"})
    start, end = torch.tensor([0, 3, 10]), torch.tensor([2, 3, 10])
    with torch.no_grad():
        result = ours(ids, start_positions=start, end_positions=end)
    expected = [
        nn.functional.cross_entropy(logits, place + 5)
        for logits, place in ((result.start_logits, start), (result.end_logits, end))
    ]
    close(result.loss, (expected[0] + expected[1]) / 2)


def test_token_types_and_positions_go_on_after_the_prompt(ids):
    ours = prompted(small_bert(BertModel), PromptTuningConfig)
    types, tokens = (ids > 50).long(), get_peft_model_state_dict(ours)["prompt_embeddings"]
    embeds = torch.cat([tokens.expand(3, 5, 32), ours.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        expected = small_bert(BertModel)(
            inputs_embeds=embeds, token_type_ids=torch.cat([torch.zeros(3, 5).long(), types], dim=1)
        )
        result = ours(ids, token_type_ids=types, position_ids=torch.arange(11)[None])
    close(result.last_hidden_state, expected.last_hidden_state)


@pytest.fixture
def tokenizer(tmp_path):
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("text", ["w7 w9 w11", "w1 w2 w3 w4 w5 w6 w7 w8"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_text_is_the_first_prompt(make, tokenizer, text, name):
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer}
    ours = get_peft_model(make(name), PromptTuningConfig(**task(name, settings)))
    theirs = peft.get_peft_model(make(name), peft.PromptTuningConfig(**task(name, settings)))
    assert torch.equal(
        get_peft_model_state_dict(ours)["prompt_embeddings"], theirs.get_prompt_embedding_to_save("default")
    )


def test_a_trained_text_prompt_loads_without_its_tokenizer(make, tokenizer, tmp_path):
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w7", "tokenizer_name_or_path": tokenizer}
    get_peft_model(make(), PromptTuningConfig(**settings)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    PeftModel.from_pretrained(make(), tmp_path / "adapter", is_trainable=True)
    model = make()
    with pytest.raises(AdapterError, match="No tokenizer"):
        get_peft_model(model, PromptTuningConfig(**settings))
    assert not any(".adapters." in name for name, _ in model.named_parameters())


def test_sampled_tokens_are_rows_of_the_vocabulary(make):
    settings = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 9}
    ours = get_peft_model(make(), PromptTuningConfig(**settings))
    tokens, words = get_peft_model_state_dict(ours)["prompt_embeddings"], make().get_input_embeddings().weight
    assert all((words == token).all(dim=1).any() for token in tokens)
    assert len(tokens.unique(dim=0)) > 1


def test_a_prefix_of_zeros_takes_attention_only(make, ids):
    for projection in (False, True):
        config = PrefixTuningConfig(num_virtual_tokens=5, init_weights="zero", prefix_projection=projection)
        tensors = get_peft_model_state_dict(get_peft_model(make(), config))
        assert tensors["prompt_embeddings"].shape == (5, 3 * 2 * 16)
        assert not tensors["prompt_embeddings"].any()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_of_ones_own_is_filled_in_place(make, ids, config):
    """As a chat does: it reads the prompt once, then token by token, with no mask."""
    ours = prompted(make(), config)
    expected = ours.generate(ids, **GREEDY)
    cache, unread, seen = DynamicCache(config=make().config), ids, ids
    with torch.no_grad():
        for _ in range(8):
            logits = ours(unread, past_key_values=cache, use_cache=True).logits[:, -1]
            logits[:, 2] = -torch.inf  # the end of the text
            unread = logits.argmax(-1, keepdim=True)
            seen = torch.cat([seen, unread], dim=1)
    assert cache.get_seq_length() == 5 + 11 + 7
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_prompt_and_lora_work_together(make, ids, config):
    ours = prompted(make(), config)
    ours.add_adapter("low", LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    alone = outputs(ours, "llama")
    ours.set_adapter(["default", "low"])
    both = outputs(ours, "llama")
    assert both.shape == alone.shape
    assert (both - alone).abs().max() > 1e-3
    ours.set_adapter("low")
    assert outputs(ours, "llama").shape[1] == 9


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_works_with_prompts_and_is_refused_with_prefixes(make, reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        ours = prompted(make(), PromptEncoderConfig).train()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours(**inputs("llama")).loss.backward()
        gradients.append([p.grad for p in ours.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(plain, checkpointed)
    prefix = prompted(make(), PrefixTuningConfig).train()
    prefix.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        prefix(**inputs("llama"))
    outputs(prefix.eval(), "llama")


def bart():
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, max_position_embeddings=64, **heads, **sizes, **ends))


def gemma():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "pad_token_id": 0}
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, layer_types=kinds, max_position_embeddings=64, **sizes))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("build", "task_type"), [(bart, "SEQ_2_SEQ_LM"), (gemma, "CAUSAL_LM")])
def test_uneven_stacks_and_sliding_windows(build, task_type, config, ids, tmp_path):
    """A decoder unlike its encoder, and windows that are shorter than the text."""
    ours = prompted(build().eval(), config, {"task_type": task_type})
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build().eval(), tmp_path).eval()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        close(ours(**batch, labels=ids).logits, theirs(**batch, labels=ids).logits)
    assert torch.equal(ours.generate(**batch, **GREEDY), theirs.generate(**batch, **GREEDY))


def test_what_cannot_be_is_refused_and_leaves_the_model_alone(make, ids):
    model = make()
    for settings, words in (
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs"),
        ({"num_virtual_tokens": 0}, "at least 1"),
        ({"prompt_tuning_init": "BEST"}, "must be one of"),
        ({"token_dim": 64}, "32 in this model"),
    ):
        with pytest.raises(AdapterError, match=words):
            get_peft_model(model, PromptTuningConfig(**settings))
    with pytest.raises(AdapterError, match="No place for a prompt"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PromptTuningConfig())
    assert not any(".adapters." in name for name, _ in model.named_parameters())

    ours = prompted(model, PromptEncoderConfig)
    tensors = get_peft_model_state_dict(ours)
    with pytest.raises(AdapterError, match="Not into a prompt encoder"):
        set_peft_model_state_dict(ours, tensors)
    with pytest.raises(AdapterError, match="packed"):
        ours(ids, cu_seq_lens_q=torch.tensor([0, 5, 11]))
    with pytest.raises(AdapterError, match="attention mask"):
        ours(ids, attention_mask=torch.ones(3, 1, 11, 11))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_does_not_reach_the_file(make):
    settings = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
    ours = get_peft_model(make(), PromptEncoderConfig(**settings)).train()
    once, twice = (get_peft_model_state_dict(ours)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(once, twice)
    assert not torch.equal(outputs(ours, "llama"), outputs(ours, "llama"))
    assert ours.training
