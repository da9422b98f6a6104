"""Fused blocks on bases of 4 and 8 bits: dequantised, used, freed."""

import bitsandbytes as bnb
import pytest
import torch
from test_fused import hidden_states, model_of, results
from torch import nn

from nbtune.fused import fused
from nbtune.modules.quantised import dequantised, keep_unpacked
from nbtune.peft import LoraConfig, get_peft_model

CONFIG = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def quantised(bits):
    """A tiny Llama with every linear layer of its blocks quantised, and the same with what these layers hold."""
    model, plain = (model_of("Llama", hidden_size=64, intermediate_size=128, head_dim=16) for _ in range(2))
    for block, twin in zip(model.model.layers, plain.model.layers, strict=True):
        for path, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            sizes = layer.in_features, layer.out_features
            if bits == 4:
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.load_state_dict({"weight": layer.weight.data})
            block.set_submodule(path, new.to("cpu"))
            keep_unpacked(new)
            twin.get_submodule(path).weight.data = dequantised(new, torch.float32)
    return model, plain


@pytest.mark.parametrize("bits", [4, 8])
def test_computes_with_the_weights_that_the_layers_hold(bits):
    model, plain = quantised(bits)
    for each in (model, plain):
        torch.manual_seed(3)
        get_peft_model(each, CONFIG).train()
    expected = results(plain)
    with fused(model) as blocks:
        assert blocks.counts == {"linear": 14, "norm": 5, "mlp": 2, "attention": 2}
        hidden, gradients = results(model)
    torch.testing.assert_close(hidden, expected[0], rtol=1e-4, atol=1e-4)
    assert len(gradients) == len(expected[1]) == 28
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("bits", [4, 8])
def test_no_dequantised_weight_is_kept(bits):
    model, _ = quantised(bits)
    get_peft_model(model, CONFIG).train()
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with fused(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model)
    shapes = {tuple(layer.shape) for layer in (torch.empty(128, 64), torch.empty(64, 128), torch.empty(64, 64))}
    assert kept
    assert not shapes & set(kept)
