"""Packed examples see only themselves, as if each had been computed alone."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from nbtune.errors import ModelError
from nbtune.kernels.attention import NAME, packed_attention, register

LENGTHS = [5, 1, 17, 9]


def heads(count, length):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(1, count, length, 8, generator=generator, requires_grad=True)


def borders(lengths=LENGTHS):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def dense(query, key, value, lengths, window=None):
    """The same by one dense mask over everything."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(segment))
    distance = position[:, None] - position[None]
    mask = (segment[:, None] == segment[None]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4, 17])
def test_equals_a_dense_block_mask_in_value_and_gradient(window):
    query, key, value = heads(6, 32), heads(2, 32), heads(3, 32)[:, :2]
    ours, _ = packed_attention(nn.Module(), query, key, value, None, sliding_window=window, cu_seq_lens_q=borders())
    theirs = dense(query, key, value, LENGTHS, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (query, key)),
        torch.autograd.grad((theirs * weights).sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", [{"softcap": 30.0}, {"s_aux": torch.zeros(6)}])
def test_refuses_what_it_does_not_compute(feature):
    with pytest.raises(ModelError, match="not supported"):
        packed_attention(
            nn.Module(), heads(6, 32), heads(2, 32), heads(2, 32), None, cu_seq_lens_q=borders(), **feature
        )


def test_refuses_to_run_without_segments():
    with pytest.raises(ModelError, match="without segments"):
        packed_attention(nn.Module(), heads(6, 32), heads(2, 32), heads(2, 32), None)


@pytest.mark.parametrize("config", ["LlamaConfig", "MistralConfig", "Qwen3Config"])
def test_packed_logits_equal_those_of_each_example_alone(config):
    import transformers

    register()
    kind = getattr(transformers, config)
    small = kind(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        sliding_window=None if config == "LlamaConfig" else 7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small, attn_implementation="sdpa").eval()
    ids = torch.randint(64, (1, sum(LENGTHS)))
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    model.set_attn_implementation(NAME)
    packed = model(
        ids, position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None], cu_seq_lens_q=borders(), use_cache=False
    ).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4, 17])
def test_a_prefix_stands_before_every_segment(window):
    query, key, value = heads(6, 32), heads(2, 32), heads(3, 32)[:, :2]
    module = nn.Module()
    module.layer_idx = 1
    first_key, first_value = heads(2, 3).detach(), heads(5, 3)[:, :2]
    prefix = [(torch.zeros(0), torch.zeros(0)), (first_key, first_value)]
    ours, _ = packed_attention(
        module, query, key, value, None, sliding_window=window, cu_seq_lens_q=borders(), prefix=prefix
    )
    # The same by giving each segment three more queries, and dropping what these see.
    parts = [tensor.split(LENGTHS, dim=2) for tensor in (query, key, value)]
    longer = [
        torch.cat([part for segment in segments for part in (first, segment)], dim=2)
        for segments, first in zip(parts, (query[:, :, :3], first_key, first_value), strict=True)
    ]
    theirs = dense(*longer, [length + 3 for length in LENGTHS], window)
    theirs = torch.cat([part[:, 3:] for part in theirs.split([length + 3 for length in LENGTHS], dim=1)], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
