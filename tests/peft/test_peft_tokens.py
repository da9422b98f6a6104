"""Trained tokens: as a method, and beside LoRA (`trainable_token_indices`), also with a head that is tied."""

from __future__ import annotations

import peft
import pytest
import safetensors.torch
import torch
from grid import MethodTests, close, disturb, outputs
from tiny_models import llama

from nbtune.errors import AdapterError
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.peft.configs.vectors import TrainableTokensConfig

TOKENS = [3, 17, 40, 41, 42, 60, 77, 90]


class TestTrainableTokens(MethodTests):
    config, oracle = TrainableTokensConfig, peft.TrainableTokensConfig
    noise = 0.5
    change = 2e-4
    cases = [
        ("llama", {"token_indices": TOKENS, "target_modules": ["embed_tokens"]}),
        ("llama", {"token_indices": TOKENS, "target_modules": ["embed_tokens", "lm_head"]}),
        ("gpt2", {"token_indices": TOKENS, "target_modules": ["wte"]}),
        ("t5", {"token_indices": TOKENS, "target_modules": ["shared"]}),
        # 0 is the padding token, which no embedding trains.
        ("bert", {"token_indices": list(range(0, 96, 2)), "target_modules": ["word_embeddings"]}),
    ]

    def test_two_active_adapters(self, make, case):
        """The rows of the last one count; PEFT refuses."""
        ours = self.two(make, case)
        ours.set_adapter(["a", "b"])
        together = outputs(ours, case[0])
        ours.merge_adapter()
        close(outputs(ours, case[0]), together, atol=3e-5)
        ours.unmerge_adapter()
        ours.set_adapter("a")
        assert (outputs(ours, case[0]) - together).abs().max() > self.change / 10
        ours.set_adapter("b")
        assert torch.equal(outputs(ours, case[0]), together)


class TestTokensBesideLora(MethodTests):
    config, oracle = LoraConfig, peft.LoraConfig
    adds = False
    noise = 0.1
    cases = [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": TOKENS, "embed_tokens": [5]}}),
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": TOKENS}),
        ("t5", {"target_modules": ["q"], "trainable_token_indices": TOKENS}),
        ("bert", {"target_modules": ["query"], "trainable_token_indices": TOKENS, "task_type": "SEQ_CLS"}),
    ]


def tied_llama():
    return llama(tie_word_embeddings=True)


def test_a_tied_head_follows_and_is_stored_once(tmp_path):
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}}
    ours = get_peft_model(tied_llama(), LoraConfig(**settings)).eval()
    disturb(ours, 0.3)
    ours.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in stored if "token" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path).eval()
    close(outputs(ours, "llama"), outputs(theirs, "llama"))
    with torch.no_grad():  # the head moves with the embedding
        change = outputs(ours, "llama") - outputs(tied_llama(), "llama")
    others = [token for token in range(96) if token not in TOKENS]
    assert change[..., TOKENS].abs().mean() > 5 * change[..., others].abs().mean()


def test_merging_keeps_a_tied_head_tied():
    ours = get_peft_model(tied_llama(), TrainableTokensConfig(token_indices=TOKENS)).eval()
    disturb(ours, 0.3)
    expected = outputs(ours, "llama")
    ours.merge_adapter()
    ours.unmerge_adapter()
    base = ours.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    plain = ours.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    close(outputs(plain, "llama"), expected)


def test_default_is_the_input_embedding(make, tmp_path):
    for name in ("llama", "gpt2", "t5", "bert", "neox"):
        theirs = peft.get_peft_model(make(name), peft.TrainableTokensConfig(token_indices=TOKENS)).eval()
        disturb(theirs, 0.5)
        theirs.save_pretrained(tmp_path / name)
        ours = get_peft_model(make(name), TrainableTokensConfig(token_indices=TOKENS))
        assert set(ours._adapters("default")) == set(
            PeftModel.from_pretrained(make(name), tmp_path / name)._adapters("default")
        )


def test_a_head_with_a_bias_keeps_it(make):
    """PEFT's tied head computes without its bias."""
    base = make("llama")
    base.lm_head = torch.nn.Linear(32, 96)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS})
    expected = outputs(base, "llama")
    close(outputs(get_peft_model(base, config), "llama"), expected)


def test_a_token_beyond_the_vocabulary_or_named_twice(make):
    with pytest.raises(AdapterError, match=r"token_indices names 96, and model.embed_tokens has 96 tokens"):
        get_peft_model(make("llama"), TrainableTokensConfig(token_indices=[95, 96]))
    with pytest.raises(AdapterError, match="different ids"):
        TrainableTokensConfig(token_indices=[3, 3])
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, -1])
    with pytest.raises(AdapterError, match="different ids"):
        get_peft_model(make("llama"), config)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"wte": [5]})
    with pytest.raises(AdapterError, match="no module of the model matches 'wte'"):
        get_peft_model(make("llama"), config)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"norm": [5]})
    with pytest.raises(AdapterError, match="only embeddings and heads have tokens"):
        get_peft_model(make("llama"), config)


def test_a_scaled_embedding_scales_the_new_rows_too(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma():
        torch.manual_seed(6)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, max_position_embeddings=64, **sizes, **heads)).eval()

    ours = get_peft_model(gemma(), TrainableTokensConfig(token_indices=TOKENS)).eval()
    close(outputs(ours, "llama"), outputs(gemma(), "llama"))
    disturb(ours, 0.3)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gemma(), tmp_path).eval()
    close(outputs(ours, "llama"), outputs(theirs, "llama"))
    ours.merge_adapter()
    close(outputs(ours, "llama"), outputs(theirs, "llama"))
