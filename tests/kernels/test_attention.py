"""Packed examples see only themselves, as if each had been computed alone."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from nbtune.errors import ModelError
from nbtune.kernels.attention import NAME, packed_attention, register, row_attention
from nbtune.kernels.segment_attention import segment_attention

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
def test_refuses_dropout_of_what_sdpa_does_not_compute(feature):
    query, key = heads(6, 32), heads(2, 32)
    with pytest.raises(ModelError, match="No attention dropout"):
        packed_attention(nn.Module(), query, key, key, None, dropout=0.1, cu_seq_lens_q=borders(), **feature)


def test_dropout_drops():
    query, key = heads(6, 32), heads(2, 32)
    torch.manual_seed(0)
    ours, _ = packed_attention(nn.Module(), query, key, key, None, dropout=0.5, cu_seq_lens_q=borders())
    assert ours.shape == (1, 32, 6, 8)
    whole, _ = packed_attention(nn.Module(), query, key, key, None, cu_seq_lens_q=borders())
    alone = ours[:, 5]  # sees itself only: its value is dropped, or doubled
    assert ((alone == 0) | torch.isclose(alone, 2 * whole[:, 5])).all()


def test_refuses_to_run_without_segments():
    with pytest.raises(ModelError, match="without segments"):
        packed_attention(nn.Module(), heads(6, 32), heads(2, 32), heads(2, 32), None)


MODELS = {
    "LlamaConfig": {},
    "Qwen3Config": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "MistralConfig": {"sliding_window": 7},
    "Gemma2Config": {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "GptOssConfig": {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    import transformers

    register()
    small = getattr(transformers, request.param)(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, **MODELS[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "sinks" in name:
            nn.init.normal_(parameter, std=2.0)  # so that scores are far from equal, and the cap and sinks count
    return model


def packed_logits(model, ids):
    model.set_attn_implementation(NAME)
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return model(ids, position_ids=places, cu_seq_lens_q=borders(), use_cache=False).logits


def logits_alone(model, ids):
    model.set_attn_implementation("eager")
    return torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)


def test_packed_logits_equal_those_of_each_example_alone(model):
    ids = torch.randint(64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    packed, alone = packed_logits(model, ids), logits_alone(model, ids)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.std(), alone.std())
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1)) / alone.numel()
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((packed * weights).sum(), parameters, allow_unused=True),
        torch.autograd.grad((alone * weights).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4, 17])
@pytest.mark.parametrize("setting", [{}, {"softcap": 2.0}, {"sinks": 6}, {"prefix": 3}], ids=str)
def test_on_a_gpu_as_on_a_cpu(window, setting):
    lengths = [50, 1, 170, 90]
    inputs = [torch.randn(1, count, sum(lengths), 64).bfloat16() for count in (6, 2, 2)]
    arguments = dict(setting)
    if "sinks" in setting:
        arguments["sinks"] = torch.randn(6)
    if "prefix" in setting:
        arguments["prefix"] = tuple(torch.randn(1, 2, 3, 64).bfloat16() for _ in range(2))
    made = []
    for device in ("cpu", "cuda"):
        moved = [tensor.to(device).requires_grad_() for tensor in inputs]
        on_device = {
            name: tuple(tensor.to(device) for tensor in value) if name == "prefix" else value
            for name, value in arguments.items()
        }
        if "sinks" in on_device:
            on_device["sinks"] = on_device["sinks"].to(device)
        output = row_attention(*moved, borders(lengths).tolist(), window=window, **on_device)
        made.append([output, *torch.autograd.grad(output.float().square().sum(), moved)])
    for a, b in zip(*made, strict=True):
        assert (a - b.cpu()).norm() < 0.02 * a.norm()


@pytest.mark.gpu
def test_segments_run_on_a_gpu_too():
    inputs = [torch.randn(1, count, 32, 8).requires_grad_() for count in (6, 2, 2)]
    on_gpu = segment_attention(*(tensor.cuda() for tensor in inputs), borders().tolist())
    torch.testing.assert_close(on_gpu.cpu(), segment_attention(*inputs, borders().tolist()), rtol=1e-4, atol=1e-5)
