"""Combinations of adapters equal those of `peft`, layer for layer and number for number."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_models import llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nbtune.errors import AdapterError
from nbtune.kernels.low_rank import (
    COMBINATION_TYPES,
    LowRank,
    combine,
    combine_tensors,
    combined_rank,
    plan_combination,
)

NAMES, WEIGHTS = ["one", "two", "three"], [0.7, -0.4, 1.1]
LINEAR_LIKE = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 1)

    def forward(self, x):
        return self.point(self.wide(x))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16))


MODELS = {
    "linear": (llama, ["q_proj", "v_proj", "down_proj"]),
    "embedding": (llama, ["embed_tokens", "o_proj"]),
    "conv1d": (gpt2, ["c_attn"]),
    "conv2d": (Convolutions, ["wide", "point"]),
}


def oracle(kind="linear", ranks=(4, 4, 4), targets=None, **config):
    """A PEFT model with adapters of random weights and different scalings."""
    make, default = MODELS[kind]
    torch.manual_seed(3)
    model = make()
    for number, (name, r) in enumerate(zip(NAMES, ranks, strict=False)):
        modules = targets[number] if targets else default
        settings = {"r": r, "lora_alpha": 3 + number, "target_modules": modules, "init_lora_weights": False, **config}
        settings["fan_in_fan_out"] = kind == "conv1d"
        if number == 0:
            model = peft.get_peft_model(model, peft.LoraConfig(**settings), name)
        else:
            model.add_adapter(name, peft.LoraConfig(**settings))
    return model


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def factors(layer, name):
    if name in layer.lora_embedding_A:
        return LowRank(layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data, layer.scaling[name])
    return LowRank(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name])


def both(model, names, weights, combination_type, svd_rank=None, **options):
    """PEFT's combination and ours, from one state of the random numbers, for every layer."""
    ranks = [model.peft_config[name].r for name in names]
    kind, rank = plan_combination(ranks, weights, combination_type, svd_rank=svd_rank, **options)
    # PEFT first makes an adapter with first weights of its own: the same as this one, of the same draws.
    torch.manual_seed(5)
    modules = set.union(*(set(model.peft_config[name].target_modules) for name in names))
    config = {"r": rank, "target_modules": modules, "init_lora_weights": model.peft_config[names[0]].init_lora_weights}
    model.add_adapter("scratch", peft.LoraConfig(**config, fan_in_fan_out=model.peft_config[names[0]].fan_in_fan_out))
    state = torch.get_rng_state()
    model.delete_adapter("scratch")
    torch.manual_seed(5)
    model.base_model.add_weighted_adapter(names, weights, "new", combination_type, svd_rank, **options)
    torch.set_rng_state(state)
    pairs = {}
    for path, layer in layers(model).items():
        here = [name for name in names if name in layer.scaling]
        given = [weights[names.index(name)] for name in here]
        transposed = "embed_tokens" in path or bool(layer.__dict__.get("fan_in_fan_out"))
        mine = combine(
            [factors(layer, name) for name in here], given, kind, rank=rank, fan_in_fan_out=transposed, **options
        )
        pairs[path] = (mine, factors(layer, "new"))
    assert len(pairs) > 1
    return pairs


def product(update):
    return update.scaling * update.B.flatten(1) @ update.A.flatten(1)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_type_on_every_kind_of_layer(kind, combination_type):
    model = oracle(kind)
    for mine, theirs in both(model, NAMES, WEIGHTS, combination_type, density=0.6).values():
        assert mine.scaling == theirs.scaling == 1
        assert (mine.A.shape, mine.B.shape) == (theirs.A.shape, theirs.B.shape)
        assert product(theirs).abs().max() > 1e-3
        if combination_type.endswith("svd"):  # singular vectors have no sign of their own
            close(product(mine), product(theirs), 1e-5)
            close(mine.A.abs(), theirs.A.abs(), 1e-4)
            close(mine.B.abs(), theirs.B.abs(), 1e-4)
        else:
            close(mine.A, theirs.A)
            close(mine.B, theirs.B)


@pytest.mark.parametrize("combination_type", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_majority_by_frequency(combination_type):
    pairs = both(oracle(), NAMES, WEIGHTS, combination_type, density=0.5, majority_sign_method="frequency")
    other = both(oracle(), NAMES, WEIGHTS, combination_type, density=0.5, majority_sign_method="total")
    for path, (mine, theirs) in pairs.items():
        close(product(mine), product(theirs), 1e-5)
        assert not torch.allclose(product(mine), product(other[path][0]), atol=1e-5)


@pytest.mark.parametrize("combination_type", ["svd", "cat", "ties_svd"])
def test_different_ranks(combination_type):
    for mine, theirs in both(oracle(ranks=(2, 3, 5)), NAMES, WEIGHTS, combination_type, density=0.5).values():
        assert mine.A.shape[0] == {"svd": 5, "cat": 10, "ties_svd": 5}[combination_type]
        close(product(mine), product(theirs), 1e-5)


@pytest.mark.parametrize("svd_rank", [1, 7, 16])
def test_the_rank_of_an_svd(svd_rank):
    for mine, theirs in both(oracle(), NAMES, WEIGHTS, "svd", svd_rank).values():
        assert mine.A.shape == theirs.A.shape
        assert len(mine.A) == svd_rank
        close(product(mine), product(theirs), 1e-5)


def test_more_rank_than_the_weight_has_is_filled_with_zeros():
    given = [LowRank(torch.randn(4, 6), torch.randn(5, 4), 2.0), LowRank(torch.randn(4, 6), torch.randn(5, 4), 0.5)]
    new = combine(given, [1.0, 1.0], "svd", rank=9)
    assert (new.A.shape, new.B.shape) == ((9, 6), (5, 9))
    close(product(new), product(given[0]) + product(given[1]), 1e-5)


@pytest.mark.parametrize("svd_clamp", [0.7, 0.95])
def test_clamped_svd(svd_clamp):
    for mine, theirs in both(oracle(), NAMES, WEIGHTS, "svd", svd_clamp=svd_clamp).values():
        close(product(mine), product(theirs), 1e-5)
        assert max(mine.A.max(), mine.B.max()).item() == pytest.approx(max(theirs.A.max(), theirs.B.max()).item())
    given = [factors(next(iter(layers(oracle()).values())), name) for name in NAMES]
    clamped = combine(given, WEIGHTS, "svd", rank=4, svd_clamp=svd_clamp)
    assert (product(clamped) - product(combine(given, WEIGHTS, "svd", rank=4))).abs().max() > 1e-3


def test_svd_with_enough_rank_is_the_sum_of_the_updates():
    model = oracle()
    for layer in layers(model).values():
        given = [factors(layer, name) for name in NAMES]
        exact = sum(weight * product(update).double() for weight, update in zip(WEIGHTS, given, strict=True))
        for combination_type, rank in (("svd", 12), ("cat", 12)):
            close(product(combine(given, WEIGHTS, combination_type, rank=rank)).double(), exact, 1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "svd", "linear", "ties", "dare_linear_svd"])
def test_adapters_that_differ_in_their_layers(combination_type):
    targets = [["q_proj", "v_proj"], ["v_proj", "o_proj"], ["q_proj", "o_proj"]]
    for mine, theirs in both(oracle(targets=targets), NAMES, WEIGHTS, combination_type, density=0.5).values():
        assert mine.A.shape == theirs.A.shape
        close(product(mine), product(theirs), 1e-5)


@pytest.mark.parametrize("combination_type", ["svd", "ties", "cat"])
@pytest.mark.parametrize("weight", [1.5, -2.0])
def test_one_adapter_is_scaled_by_linear_whatever_the_type(combination_type, weight):
    model = oracle(use_rslora=True)
    assert plan_combination([4], [weight], combination_type) == ("linear", 4)
    for layer in layers(model).values():
        update = factors(layer, "two")
        close(product(combine([update], [weight], "linear", rank=4)), weight * product(update), 1e-5)
    for mine, theirs in both(model, ["two"], [weight], combination_type).values():
        close(mine.A, theirs.A)
        close(mine.B, theirs.B)


def test_precision_is_the_adapters_and_fp64_stays():
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float64, 1e-12)):
        given = [LowRank(torch.randn(3, 8).to(dtype), torch.randn(6, 3).to(dtype), 1.0) for _ in range(2)]
        exact = sum(
            weight * product(update._replace(A=update.A.double(), B=update.B.double()))
            for weight, update in zip([0.3, 0.9], given, strict=True)
        )
        for combination_type in ("cat", "svd"):
            new = combine(given, [0.3, 0.9], combination_type, rank=6)
            assert new.A.dtype == new.B.dtype == dtype
            torch.testing.assert_close(new.B.double() @ new.A.double(), exact, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_shapes_on_the_meta_device(combination_type):
    given = [LowRank(torch.empty(4, 7, 3, 3, device="meta"), torch.empty(9, 4, 1, 1, device="meta"), 1.0)] * 2
    rank = combined_rank([4, 4], combination_type)
    new = combine(given, [1.0, 1.0], combination_type, rank=rank, density=0.5)
    assert new.A.is_meta
    assert new.B.is_meta
    assert (new.A.shape, new.B.shape) == ((rank, 7, 3, 3), (9, rank, 1, 1))


def test_density_one_prunes_nothing_and_draws_nothing():
    given = [LowRank(torch.randn(3, 8), torch.randn(6, 3), 1.0) for _ in range(2)]
    state = torch.get_rng_state()
    new = combine(given, [0.5, 0.5], "dare_linear", rank=3, density=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    close(new.A, combine(given, [0.5, 0.5], "linear", rank=3).A)


def test_ranks():
    assert combined_rank([2, 3, 5], "svd") == 5
    assert combined_rank([2, 3, 5], "ties_svd", 7) == 7
    assert combined_rank([2, 3, 5], "cat", 7) == 10
    assert combined_rank([4, 4], "dare_ties") == 4


@pytest.mark.parametrize(
    ("ranks", "weights", "options", "word"),
    [
        ([4, 4], [1, 1], {"combination_type": "mean"}, "magnitude_prune_svd"),
        ([], [], {}, "adapter"),
        ([4, 4], [1], {}, "2 adapters and 1 weights"),
        *[([4, 8], [1, 1], {"combination_type": kind, "density": 0.5}, "4, 8") for kind in LINEAR_LIKE],
        *[([4, 4], [1, 1], {"combination_type": kind}, "density") for kind in COMBINATION_TYPES[3:]],
        ([4, 4], [1, 1], {"combination_type": "ties", "density": 0.0}, "0.0"),
        ([4, 4], [1, 1], {"combination_type": "ties", "density": 1.5}, "1.5"),
        ([4, 4], [1, 1], {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "frequency"),
        ([4, 4], [1, 1], {"svd_clamp": 2.0}, "quantile"),
        ([4, 4], [1, 1], {"svd_rank": 0}, "1 or more"),
    ],
)
def test_what_cannot_be_combined_is_refused(ranks, weights, options, word):
    with pytest.raises(AdapterError, match=word):
        plan_combination(ranks, weights, **options)


def test_ranks_that_differ_in_one_layer_are_refused():
    given = [LowRank(torch.randn(r, 8), torch.randn(6, r), 1.0) for r in (2, 3)]
    with pytest.raises(AdapterError, match="2, 3"):
        combine(given, [1.0, 1.0], "linear", rank=3)


def test_ia3_vectors_are_summed_as_in_peft():
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(llama(), config, "one")
    model.add_adapter("two", config)
    vectors = [module for module in model.modules() if isinstance(module, peft.tuners.ia3.IA3Layer)]
    for layer in vectors:
        for name in ("one", "two"):
            layer.ia3_l[name].data.normal_()
    model.base_model.add_weighted_adapter(["one", "two"], [0.3, -1.2], "new")
    assert len(vectors) == 6
    for layer in vectors:
        close(combine_tensors([layer.ia3_l["one"], layer.ia3_l["two"]], [0.3, -1.2]), layer.ia3_l["new"].data)
