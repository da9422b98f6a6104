"""First weights of LoRA against `peft`, and against their own definitions in fp64."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from tiny_models import llama
from torch import nn

from nbtune.errors import AdapterError
from nbtune.kernels import low_rank_inits as inits
from nbtune.modules import eva as eva_module

OUT, IN, R = 24, 40, 6


def weight(dtype=torch.float32):
    """A random weight with singular values that fall by a third each."""
    U, _, Vh = torch.linalg.svd(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    return (U.double() * 3 * (2 / 3) ** torch.arange(OUT) @ Vh.double()).to(dtype)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def peft_layer(init, alpha=9, r=R, W=None):
    """PEFT's Lora layer on one Linear, and the weight that the Linear had."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    model[0].weight.data = weight() if W is None else W.clone()
    before = model[0].weight.data.clone()
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    return peft.get_peft_model(model, config).base_model.model[0], before


def weights_of(layer):
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_is_pefts(init):
    layer, W = peft_layer(init)
    niter = None if init == "pissa" else 16
    A, B = inits.pissa(W, R, 9 / R, niter)
    theirs_A, theirs_B = weights_of(layer)
    close(9 / R * B @ A, W - layer.base_layer.weight, 2e-5)
    if niter is None:
        close(A.abs(), theirs_A.abs(), 1e-5)
        close(B.abs(), theirs_B.abs(), 1e-5)
    else:  # from other random numbers
        close(A.abs(), theirs_A.abs(), 1e-4)
        close(B.abs(), theirs_B.abs(), 1e-4)


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_pissa_is_the_best_approximation(scaling):
    W = weight(torch.float64)
    A, B = inits.pissa(W, R, scaling)
    residual = W - scaling * B @ A
    singular = torch.linalg.svdvals(W)
    close(torch.linalg.svdvals(residual)[: OUT - R], singular[R:], 1e-10)
    fast_A, fast_B = inits.pissa(W, R, scaling, niter=60)
    close(fast_B @ fast_A, B @ A, 1e-6)


def test_fast_pissa_repeats_itself_and_leaves_the_random_numbers_alone():
    for W in (weight(), weight().T):
        state = torch.get_rng_state()
        first = inits.pissa(W, R, niter=2)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        again = inits.pissa(W, R, niter=2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        # On a matrix [m, n], m >= n, it is torch's algorithm on the numbers of one seed.
        torch.manual_seed(42)
        U, S, V = torch.svd_lowrank(W, R, niter=2)
        close(first[1] @ first[0], U * S @ V.T, 1e-5)


def test_olora_is_pefts():
    layer, W = peft_layer("olora")
    A, B = inits.olora(W, R)
    theirs_A, theirs_B = weights_of(layer)
    close(A, theirs_A)
    close(B, theirs_B)
    close(9 / R * B @ A, W - layer.base_layer.weight, 1e-5)
    close(B.T @ B, torch.eye(R), 1e-6)


def test_orthogonal_is_pefts_and_starts_at_zero():
    layer, W = peft_layer(True)
    torch.manual_seed(7)
    A, B = inits.orthogonal(W, R)
    torch.manual_seed(7)
    layer.orthogonal_init("default")
    theirs_A, theirs_B = weights_of(layer)
    close(A, theirs_A)
    close(B, theirs_B)
    close(B @ A, torch.zeros(OUT, IN))
    assert min(A.abs().max(), B.abs().max()) > 0.05
    with pytest.raises(AdapterError, match="even"):
        inits.orthogonal(W, 5)


@pytest.mark.parametrize(("init", "ours"), [(True, inits.default), ("gaussian", inits.gaussian)])
def test_random_inits_are_pefts(init, ours):
    layer, W = peft_layer(init)
    torch.manual_seed(7)
    A, B = ours(W, R)
    torch.manual_seed(7)
    layer.reset_lora_parameters("default", init)
    assert torch.equal(A, weights_of(layer)[0])
    assert not B.any()


def test_shapes_of_an_embedding_and_of_convolutions():
    config = peft.LoraConfig(r=R, target_modules=["0", "1", "2"])
    base = nn.Sequential(nn.Embedding(30, 8), nn.Conv1d(4, 10, 3), nn.Conv2d(4, 10, (3, 2)))
    model = peft.get_peft_model(base, config).base_model.model
    for index in (1, 2):
        A, B = inits.default(model[index].base_layer.weight, R)
        assert (A.shape, B.shape) == tuple(w.shape for w in weights_of(model[index]))
    torch.manual_seed(7)
    A, B = inits.embedding(model[0].base_layer.weight.T, R)
    torch.manual_seed(7)
    model[0].reset_lora_parameters("default", True)
    assert torch.equal(A, model[0].lora_embedding_A["default"])
    assert torch.equal(B, model[0].lora_embedding_B["default"])


ALL = {
    "default": inits.default,
    "gaussian": inits.gaussian,
    "embedding": inits.embedding,
    "orthogonal": inits.orthogonal,
    "pissa": inits.pissa,
    "pissa_niter_2": lambda W, r: inits.pissa(W, r, niter=2),
    "olora": inits.olora,
}


@pytest.mark.parametrize("init", ALL)
def test_precision_and_meta(init):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        A, B = ALL[init](nn.Parameter(weight(dtype)), R)
        assert A.dtype == B.dtype == expected
        assert not A.requires_grad
        assert A.is_contiguous() or init.startswith("pissa")
        meta_A, meta_B = ALL[init](weight(dtype).to("meta"), R)
        assert (meta_A.shape, meta_B.shape) == (A.shape, B.shape) == ((R, IN), (OUT, R))
        assert (meta_A.dtype, meta_A.is_meta, meta_B.is_meta) == (expected, True, True)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_rank_beyond_the_weight_is_refused(init):
    with pytest.raises(AdapterError, match=f"r is {OUT + 1}"):
        ALL[init](weight(), OUT + 1)
    with pytest.raises(AdapterError, match="matrix"):
        ALL[init](torch.randn(8, 8, 3, 3), 2)


@pytest.mark.parametrize("rslora", [False, True])
def test_as_plain_is_pefts_conversion(tmp_path, rslora):
    """PEFT saves a trained PiSSA as the plain LoRA that `as_plain` makes of the same weights."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    model[0].weight.data = weight()
    config = peft.LoraConfig(r=R, lora_alpha=9, target_modules=["0"], init_lora_weights="pissa", use_rslora=rslora)
    model = peft.get_peft_model(model, config)
    layer = model.base_model.model[0]
    A0, B0 = (w.clone() for w in weights_of(layer))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for w in weights_of(layer):
        w.add_(0.1 * torch.randn_like(w))
    A, B = weights_of(layer)
    trained = layer.base_layer.weight + layer.scaling["default"] * B @ A
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    base = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    base[0].weight.data = weight()
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "end").base_model.model[0]
    plain_A, plain_B = inits.as_plain(A, B, A0, B0)
    assert plain.scaling["default"] == pytest.approx(layer.scaling["default"])
    close(plain_A, weights_of(plain)[0])
    close(plain_B, weights_of(plain)[1])
    close(weight() + layer.scaling["default"] * plain_B @ plain_A, trained, 1e-5)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture
def batches():
    """Batches with padding and with tokens that carry no label."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(6):
        ids = torch.randint(1, 96, (8, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 18:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def targets(model):
    return {path: module for path, module in model.named_modules() if path.rpartition(".")[2] in TARGETS}


def skewed():
    """A model whose layers' inputs have some directions much stronger than the others, and not the same everywhere."""
    model = llama()
    generator = torch.Generator().manual_seed(5)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in ("up_proj", "v_proj", "o_proj"):
            rows = torch.logspace(0.5, -1.5, module.out_features)[
                torch.randperm(module.out_features, generator=generator)
            ]
            module.weight.data *= 4 * rows[:, None]
    scale = torch.logspace(0.5, -1.5, model.config.hidden_size)
    model.model.embed_tokens.weight.data *= scale[torch.randperm(len(scale), generator=generator)]
    return model


def inputs_of(model, layers, batches, count):
    """All inputs [tokens, in] of the layers, in fp64."""
    seen = {path: [] for path in layers}
    for batch in batches:
        handles = [
            layer.register_forward_pre_hook(lambda _, args, p=path, b=batch: seen[p].append(args[0][count(b)].double()))
            for path, layer in layers.items()
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {path: torch.cat(xs) for path, xs in seen.items()}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts(batches, rho):
    model = skewed()
    layers = targets(model)
    tau = 0.9999
    eva_config = peft.tuners.lora.EvaConfig(rho=rho, tau=tau)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=eva_config)
    theirs = get_eva_state_dict(model, batches, config, show_progress_bar=False)
    ours = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 4), rho=rho, tau=tau)
    assert {path: len(A) for path, A in ours.items()} == {path: len(A) for path, A in theirs.items()}
    assert sum(len(A) for A in ours.values()) == 4 * len(layers) == 72
    for path, A in ours.items():
        assert torch.cosine_similarity(A, theirs[path].float()).abs().min() > 0.999
    if rho > 1:
        assert len({len(A) for A in ours.values()}) > 2


def test_eva_finds_the_principal_directions_of_the_inputs_that_count(batches):
    model = skewed()
    layers = targets(model)
    ours = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 2), rho=1.0, tau=0.9999)
    used = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 2), rho=1.0, tau=0.9999, use_label_mask=False)
    labelled = inputs_of(model, layers, batches, lambda batch: batch["labels"] != -100)
    unpadded = inputs_of(model, layers, batches, lambda batch: batch["attention_mask"].bool())
    for result, inputs in ((ours, labelled), (used, unpadded)):
        for path, x in inputs.items():
            exact = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
            best = (x - x.mean(0)) @ exact.T
            found = (x - x.mean(0)) @ result[path].double().T
            assert found.square().sum() > 0.99 * best.square().sum()
            close(result[path] @ result[path].T, torch.eye(2), 1e-4)
    assert any(not torch.allclose(ours[path].abs(), used[path].abs(), atol=1e-3) for path in layers)


def test_incremental_directions_equal_those_of_all_rows():
    scales = torch.tensor([1, 0.5, 0.25, 0.1] + [1e-3] * 16, dtype=torch.float64)
    x = (torch.randn(300, 20, dtype=torch.float64) * scales + torch.rand(20)).float()
    directions = inits.InputDirections(4)
    for rows in x.split([50, 120, 30, 100]):
        directions.update(rows, 0.99)
    centred = x.double() - x.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    close(directions.directions.abs().double(), Vh[:4].abs(), 1e-3)
    close(directions.explained().double(), S[:4].square() / S.square().sum(), 1e-4)
    close(directions.mean, x.mean(0), 1e-5)
    assert directions.converged.all()


def test_eva_leaves_the_model_as_it_was(batches):
    model = llama().train()
    model.lm_head.eval()
    layers = targets(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    eva_module.eva(model, layers, batches, dict.fromkeys(layers, 2), rho=1.0, tau=0.9)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.lm_head.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_eva_whitens_each_layer_once(batches):
    model = skewed()
    layers = targets(model)
    plain = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 2), rho=1.0)
    white = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 2), rho=1.0, whiten=True)
    for path in layers:
        norms = white[path].norm(dim=1)
        close(white[path] / norms[:, None], plain[path], 1e-5)
        assert norms[0] < norms[1]  # the stronger direction is made the weaker
    # q, k and v have one input, and so one A.
    q, k = (white[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert torch.equal(q, k)


def test_eva_keeps_to_the_width_of_a_layer(batches):
    model = skewed()
    layers = {path: layer for path, layer in targets(model).items() if path.endswith("layers.0.self_attn.q_proj")}
    found = eva_module.eva(model, layers, batches, dict.fromkeys(layers, 32), rho=2.0, tau=0.0)
    assert {tuple(A.shape) for A in found.values()} == {(32, 32)}


def test_eva_refuses_what_cannot_settle(batches):
    model = llama()
    layers = targets(model)
    ranks = dict.fromkeys(layers, 2)
    with pytest.raises(AdapterError, match="list"):
        eva_module.eva(model, layers, [], ranks)
    with pytest.raises(AdapterError, match="rho"):
        eva_module.eva(model, layers, batches, ranks, rho=0.5)
    short = [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]
    with pytest.raises(AdapterError, match="tokens that count"):
        eva_module.eva(model, layers, short, ranks, rho=4.0, max_batches=5)
    unlabelled = [{**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}]
    with pytest.raises(AdapterError, match="no token"):
        eva_module.eva(model, layers, unlabelled, ranks)
    with pytest.raises(AdapterError, match="no part"):
        eva_module.eva(model, {"idle": nn.Linear(3, 3)}, batches, {"idle": 1})
    assert not any(module._forward_pre_hooks for module in model.modules())
