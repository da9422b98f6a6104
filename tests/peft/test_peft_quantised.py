"""Quantised base layers: what they hold, merging into them, LoftQ; bitsandbytes and peft are the oracles."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nbtune.errors import AdapterError
from nbtune.modules import quantised
from nbtune.modules.kbit import prepare_model_for_kbit_training
from nbtune.modules.loftq import loftq, loftq_of_base, quantise_4bit

bnb = quantised.bitsandbytes()

FOUR_BITS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4, double": {"quant_type": "nf4", "compress_statistics": True},
}
KINDS = [*FOUR_BITS, "8-bit", "8-bit, threshold"]
OUT, IN = 64, 128


def layer(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, out: int = OUT, inputs: int = IN):
    """A quantised layer on the CPU, and the float weight that it was made from."""
    if kind in FOUR_BITS:
        made = bnb.nn.Linear4bit(inputs, out, bias=bias, compute_dtype=dtype, **FOUR_BITS[kind])
    else:
        threshold = 6.0 if "threshold" in kind else 0.0
        made = bnb.nn.Linear8bitLt(inputs, out, bias=bias, has_fp16_weights=False, threshold=threshold)
    made.to(dtype)
    # Rows of very different sizes, so that a scale in the wrong place shows.
    made.weight.data = (torch.randn(out, inputs) * torch.logspace(-1, 1, out)[:, None]).to(dtype)
    weight = made.weight.data.clone()
    return made.to("cpu").requires_grad_(False), weight


def own_dequantisation(made) -> torch.Tensor:
    """bitsandbytes' own, right as long as the layer never ran."""
    if isinstance(made, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(made.weight.data, made.weight.SCB)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# What a layer holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_is_bitsandbytes_own(kind, dtype):
    made, weight = layer(kind, dtype)
    held = quantised.dequantised(made)
    assert held.shape == (OUT, IN)
    assert held.dtype is (dtype if kind in FOUR_BITS else torch.float32)
    assert torch.equal(held, own_dequantisation(made))
    assert relative(held, weight) < (0.13 if kind in FOUR_BITS else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_in_a_precision_of_choice(kind):
    made, _ = layer(kind, torch.bfloat16)
    exact = quantised.dequantised(made, torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        held = quantised.dequantised(made, dtype)
        assert held.dtype is dtype
        assert torch.equal(held, exact.to(dtype))  # rounded once, never through another precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_after_forward_passes(kind, dtype):
    made, _ = layer(kind, dtype)
    quantised.keep_unpacked(made)
    before, x = own_dequantisation(made).clone(), torch.randn(3, IN, dtype=dtype)
    for training in (False, True, False):
        made.train(training)
        with torch.no_grad():
            made(x)
        assert torch.equal(quantised.dequantised(made), before)
        made(x.clone().requires_grad_()).sum().backward()
        assert torch.equal(quantised.dequantised(made), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_held_weight(kind, dtype):
    """In eval and in train mode, also in train mode after eval mode."""
    made, _ = layer(kind, dtype)
    quantised.keep_unpacked(made)
    weight, x = quantised.dequantised(made, torch.float64), torch.randn(5, IN, dtype=dtype, requires_grad=True)
    expected = F.linear(x.double(), weight, made.bias.double())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    close = 1e-5 if dtype is torch.float32 else 1e-2
    for training in (False, True, False):
        made.train(training)
        with torch.no_grad():
            quiet = made(x)
        y = made(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        # In eval mode 8-bit layers round the input to 8 bits too.
        rounded = 0.02 if kind not in FOUR_BITS and not training else 0
        assert relative(y.detach(), expected.detach()) < close + rounded
        assert relative(quiet, expected.detach()) < close + rounded
        assert relative(gradient, expected_gradient) < close


def packs() -> bool:
    return bnb.functional.has_avx512bf16()


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_layer_that_ran_before_anybody_kept_it_unpacked(kind):
    """Then its scales are rounded to bf16 on some CPUs; what it holds is read right, and it computes that."""
    made, _ = layer(kind, torch.bfloat16)
    before, x = own_dequantisation(made).float(), torch.randn(3, IN, dtype=torch.bfloat16)
    made.eval()
    with torch.no_grad():
        packed_output = made(x)
    if packs():
        assert relative(own_dequantisation(made), before) > 1
    held = quantised.dequantised(made)
    assert held.dtype is torch.bfloat16
    assert relative(held, before) < 2**-8
    assert relative(packed_output, F.linear(x, held, made.bias)) < 1e-2

    state = made.weight.quant_state
    assert torch.equal(quantised.dequantised(made), held)
    assert made.weight.quant_state is state  # reading changes nothing
    quantised.keep_unpacked(made)
    assert torch.equal(quantised.dequantised(made), held)
    assert torch.equal(own_dequantisation(made), held)
    y = made.train()(x.requires_grad_())
    y.sum().backward()
    assert relative(x.grad, torch.ones(3, OUT) @ held.float()) < 1e-2
    assert relative(made.eval()(x), F.linear(x, held, made.bias)) < 1e-2
    loaded = copy.deepcopy(made)
    loaded.load_state_dict(made.state_dict(), strict=False)
    assert torch.equal(own_dequantisation(loaded), held)


def test_a_shape_that_bitsandbytes_cannot_repack():
    made, _ = layer("nf4", out=48, inputs=64)
    quantised.keep_unpacked(made)
    with torch.no_grad():
        y = made.eval()(x := torch.randn(2, 64))
    assert relative(y, F.linear(x, quantised.dequantised(made), made.bias)) < 1e-5


def test_which_layers_are_quantised():
    kinds = {kind: layer(kind)[0] for kind in KINDS}
    assert [quantised.kind(made) for made in kinds.values()] == [
        "4-bit nf4",
        "4-bit fp4",
        "4-bit nf4",
        "8-bit",
        "8-bit",
    ]
    assert all(quantised.is_quantised(made) for made in kinds.values())
    assert not quantised.is_quantised(nn.Linear(4, 4))
    assert not quantised.is_quantised(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=True))
    plain = nn.Linear(4, 4)
    quantised.keep_unpacked(plain)
    assert "support_avx512bf16_for_cpu" not in vars(plain)


@pytest.mark.parametrize("made", [bnb.nn.Linear4bit(8, 8), bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)])
def test_a_weight_that_is_still_float(made):
    with pytest.raises(AdapterError, match="not quantised yet"):
        quantised.dequantised(made)


def test_bitsandbytes_is_not_imported_for_nothing():
    program = (
        "import sys, nbtune, nbtune.peft, nbtune.peft.model\n"
        "from torch import nn; from nbtune.modules import quantised\n"
        "print(quantised.is_quantised(nn.Linear(2, 2)), 'bitsandbytes' in sys.modules)\n"
        "quantised.bitsandbytes(); print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
    assert done.stderr == ""  # without it bitsandbytes says that a kernel is not installed


# Merging


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_layer(kind, bias):
    made, _ = layer(kind, torch.bfloat16, bias)
    weight = quantised.dequantised(made, torch.float32) + 0.1 * torch.randn(OUT, IN)
    merged = quantised.merged_layer(made, weight, None if made.bias is None else made.bias.float() + 1)
    assert isinstance(merged, nn.Linear)
    assert not quantised.is_quantised(merged)
    assert torch.equal(merged.weight, weight.bfloat16())
    assert (merged.bias is not None) == bias
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert set(merged.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    for dtype in (torch.bfloat16, torch.float32):  # as the quantised layer takes both
        x = torch.randn(3, IN, dtype=dtype)
        y = merged(x)
        assert y.dtype is made(x).dtype is dtype
        assert relative(y, F.linear(x.float(), weight, None if made.bias is None else made.bias.float() + 1)) < 1e-2


def test_precision_of_a_merged_layer():
    made, weight = layer("nf4", torch.float32)
    assert quantised.merged_layer(made, weight, None).weight.dtype is torch.float32
    assert quantised.merged_layer(made, weight, None, torch.float16).weight.dtype is torch.float16
    made, weight = layer("nf4", torch.float16)
    assert quantised.merged_layer(made, weight, None).weight.dtype is torch.float16
    assert quantised.merged_layer(layer("8-bit")[0], weight, None).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_requantised(kind):
    made, weight = layer(kind, torch.bfloat16)
    quantised.keep_unpacked(made)
    made.eval()
    target = weight.float() + torch.randn(OUT, IN)
    again = quantised.requantised(made, target, made.bias + 1)
    assert type(again) is type(made)
    assert quantised.kind(again) == quantised.kind(made)
    assert not again.training
    held = quantised.dequantised(again)
    assert held.dtype is quantised.dequantised(made).dtype
    assert torch.equal(held, own_dequantisation(again))
    assert relative(held, target) < (0.13 if kind in FOUR_BITS else 0.01)
    if kind in FOUR_BITS:
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
            assert getattr(again.weight, name) == getattr(made.weight, name)
        assert again.compute_dtype is made.compute_dtype
        assert (again.weight.quant_state.state2 is not None) == FOUR_BITS[kind]["compress_statistics"]
    else:
        assert again.state.threshold == made.state.threshold
        assert not again.state.has_fp16_weights
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative(again(x), F.linear(x.float(), held.float(), made.bias.float() + 1)) < 0.02
    assert torch.equal(quantised.dequantised(again), held)
    # What it holds already survives: the values are on its grid. (8 bits pass through fp16.)
    same = quantised.requantised(again, held, None)
    assert same.bias is None
    if FOUR_BITS.get(kind, {}).get("compress_statistics") is False:
        assert relative(quantised.dequantised(same), held) < 2**-8


@pytest.mark.parametrize("kind", KINDS)
def test_report(kind):
    made, _ = layer(kind, torch.bfloat16)
    exact = quantised.dequantised(made, torch.float32) + 0.3 * torch.randn(OUT, IN)
    halved = quantised.merge_report("layers.0.q_proj", made, exact, quantised.merged_layer(made, exact, None))
    assert (halved.path, halved.kind) == ("layers.0.q_proj", quantised.kind(made))
    assert halved.relative_error == pytest.approx(relative(exact.bfloat16(), exact), rel=1e-5)
    assert 0 < halved.relative_error < 2**-8

    again = quantised.requantised(made, exact, None)
    worse = quantised.merge_report("layers.0.q_proj", made, exact, again)
    assert worse.relative_error == pytest.approx(relative(quantised.dequantised(again, torch.float32), exact), rel=1e-5)
    assert worse.relative_error > halved.relative_error
    zero = torch.zeros(OUT, IN)
    assert quantised.merge_report("", made, zero, quantised.merged_layer(made, zero, None)).relative_error == 0


# LoftQ


class CpuForCuda(TorchFunctionMode):
    """peft's LoftQ insists on moving to CUDA; here it moves nowhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args = [torch.device("cpu") if str(arg).startswith("cuda") else arg for arg in args]
            kwargs = {name: "cpu" if name == "device" else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantise_4bit(quant_type):
    weight = torch.randn(OUT, IN)
    made = bnb.nn.Linear4bit(IN, OUT, quant_type=quant_type, compress_statistics=False)
    made.weight.data = weight.clone()
    assert torch.equal(quantise_4bit(weight, quant_type), own_dequantisation(made.to("cpu")))
    assert quantise_4bit(weight.bfloat16()).dtype is torch.bfloat16
    narrow = torch.randn(16, 32)  # rows of half a block
    assert relative(quantise_4bit(narrow, quant_type), narrow) < 0.13


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_pefts(bits, iterations):
    from peft.utils.loftq_utils import loftq_init

    weight = torch.randn(OUT, IN)
    with CpuForCuda():
        expected, expected_A, expected_B = loftq_init(weight, bits, 8, iterations)
    held, A, B = loftq(weight, bits, 8, iterations)
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(B @ A, expected_B @ expected_A, rtol=0, atol=1e-5)
    torch.testing.assert_close(A.abs(), expected_A.abs(), rtol=0, atol=1e-5)  # a singular vector's sign is free
    plain = quantise_4bit(weight) if bits == 4 else held
    assert relative(held + B @ A, weight) < relative(plain, weight)


def test_loftq_of_a_base_is_pefts():
    from peft.utils.loftq_utils import _loftq_init_new

    made, weight = layer("nf4")
    with CpuForCuda():
        expected_A, expected_B = _loftq_init_new(made.weight, weight, 4, 8)
    quantised.keep_unpacked(made)
    made.eval()(torch.randn(2, IN))
    A, B = loftq_of_base(weight, made, 8)
    torch.testing.assert_close(B @ A, expected_B @ expected_A, rtol=0, atol=1e-5)
    held = quantised.dequantised(made)
    left = torch.linalg.svdvals(weight - held)[8:].norm()
    assert torch.linalg.norm(held + B @ A - weight) == pytest.approx(left.item(), rel=1e-4)  # no better rank 8


@pytest.mark.parametrize(("bits", "rank", "iterations"), [(2, 8, 1), (4, 65, 1), (4, 8, 0)])
def test_loftq_settings_that_are_none(bits, rank, iterations):
    with pytest.raises(AdapterError):
        loftq(torch.randn(OUT, IN), bits, rank, iterations)


# Preparing a model


def wide_llama():
    return tiny_models.llama(hidden_size=64, intermediate_size=128)  # rows of whole blocks


def quantised_llama(tmp_path, dtype=torch.bfloat16, **settings):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide_llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_model(ids, tmp_path, reentrant):
    model = quantised_llama(tmp_path)
    for module in model.modules():
        quantised.keep_unpacked(module)
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert prepare_model_for_kbit_training(model, True, {"use_reentrant": reentrant}) is model
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype is (torch.float32 if "norm" in name else stored[name])
    assert model.lm_head.weight.dtype is model.model.embed_tokens.weight.dtype is torch.bfloat16
    assert model.is_gradient_checkpointing
    with torch.no_grad():
        after = model.eval()(input_ids=ids).logits
    assert relative(after, before) < 0.03

    seen = {}
    layers = model.model.layers
    for number, block in enumerate(layers):
        block.register_forward_hook(lambda _, args, out, number=number: seen.update({number: out.dtype}))
    low_rank = nn.Parameter(torch.zeros(8, 64))  # a hand-made adapter on the first projection
    layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, y: y + args[0] @ low_rank.t() @ torch.ones(8, 64))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert set(seen.values()) == {torch.float32}
    assert low_rank.grad.norm() > 0


def test_gradient_of_a_prepared_model(ids, tmp_path):
    """Against the same model with the weights that its quantised layers hold, in fp32 throughout."""
    model = quantised_llama(tmp_path, torch.float32)
    prepare_model_for_kbit_training(model)
    twin = wide_llama().requires_grad_(False)
    for name, module in model.named_modules():
        if quantised.is_quantised(module):
            twin.get_submodule(name).weight.data = quantised.dequantised(module)
    gradients = []
    for each in (model, twin):
        low_rank = nn.Parameter(torch.zeros(8, 64))
        each.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda _, args, y, low_rank=low_rank: y + args[0] @ low_rank.t() @ torch.ones(8, 64)
        )
        with torch.no_grad():
            each.eval()(input_ids=ids)  # an evaluation before training must not cost the gradient
        each.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(low_rank.grad)
    assert relative(*gradients) < 1e-4
