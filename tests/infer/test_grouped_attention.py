"""Grouped attention of one token against transformers' own, alone and in whole models."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nbtune._transformers import DynamicCache
from nbtune.infer.attention import NAME, grouped_attention, use_grouped_attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 6), (1, 2), (5, 6)])
def test_attention_is_that_of_sdpa(tokens, heads, masked):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // 2, True
    query = torch.randn(3, tokens, heads, 8).transpose(1, 2)  # as projections leave it
    key, value = torch.randn(2, 3, 2, 5, 8).unbind()
    mask = torch.ones(3, 1, tokens, 5, dtype=torch.bool).tril(5 - tokens) if masked else None
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert ours.shape == (3, tokens, heads, 8)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_model_reads_padded_rows_and_goes_on_as_before(tiny_model):
    from nbtune._transformers import AutoModelForCausalLM

    plain, grouped = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    use_grouped_attention(grouped)
    assert (plain.config._attn_implementation, grouped.config._attn_implementation) == ("sdpa", NAME)
    ids = torch.randint(5, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for model in (plain, grouped):
        for attention_mask in (mask, None):
            cache = DynamicCache(config=model.config)
            for start, end in ((0, 6), (6, 7), (7, 9)):  # a prompt, a token, a piece of text
                seen = None if attention_mask is None else attention_mask[:, :end]
                with torch.inference_mode():
                    logits = model(ids[:, start:end], attention_mask=seen, past_key_values=cache).logits
                found.append(logits)
    for ours, theirs in zip(found[6:], found[:6], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
