"""The whole path on a GPU, small: `uv run pytest -m gpu`. What a CPU computes is the oracle."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nbtune as nt
from nbtune.fused import fused
from nbtune.kernels.attention import packed_attention
from nbtune.kernels.linear_cross_entropy import linear_cross_entropy
from nbtune.models import load_tokenizer
from nbtune.models.training import prepare_for_training
from nbtune.modules.checkpointing import blocks_of, checkpoint_blocks
from nbtune.modules.offload import CudaLane, offloaded_checkpoints
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.run import Run
from nbtune.spec import ModelSpec, RunSpec
from nbtune.train.loss import CausalLMLoss

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ROWS = [{"instruction": f"Say {word}.", "output": word * 3} for word in "zero one two three four five".split()]
TRAINING = {
    "max_steps": 3, "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "eval_steps": 0, "save_steps": 0, "learning_rate": 1e-2,
}  # fmt: skip
BORDERS = (0, 70, 71, 199, 256)  # of segments, one of a single token


def llama(vocabulary: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=3, **sizes))


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = load_tokenizer(ModelSpec())
    tokenizer.save_pretrained(folder)
    llama(len(tokenizer)).save_pretrained(folder)
    return str(folder)


def train(model: str | dict, folder, **training) -> Run:
    spec = RunSpec(model=model, data=ROWS, method={"r": 64}, training=TRAINING | training, tracking={"mlflow": False})
    run = nt.train(spec, runs_dir=folder).wait()
    assert run.status == "finished", run.events()[-1]
    return run


def steps(run: Run) -> list[dict]:
    return [event for event in run.events() if event["type"] == "train"]


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in steps(run)]


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory) -> Run:
    return train(tiny_llama, tmp_path_factory.mktemp("runs"))


def test_a_run_trains_on_the_gpu_in_bf16(plain):
    (start,) = [event for event in plain.events() if event["type"] == "start"]
    assert torch.device(start["device"]).type == DEVICE
    assert start["dtype"] == "bfloat16"
    assert losses(plain)[-1] < losses(plain)[0]
    assert all(step["grad_norm"] > 0 for step in steps(plain))
    assert 0 < steps(plain)[-1]["peak_memory_bytes"] < 2**31


def test_a_run_in_4_bits_trains(tiny_llama, tmp_path, plain):
    run = train({"name": tiny_llama, "load_in_4bit": True}, tmp_path)
    assert losses(run)[-1] < losses(run)[0]
    assert losses(run)[0] == pytest.approx(losses(plain)[0], rel=0.02)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_the_optimisers_of_bitsandbytes_train_alike(tiny_llama, tmp_path, plain, optim):
    assert losses(train(tiny_llama, tmp_path, optim=optim)) == pytest.approx(losses(plain), rel=0.02)


def test_checkpoints_on_the_host_change_no_loss(tiny_llama, tmp_path):
    checkpointed = train(tiny_llama, tmp_path / "on the GPU", gradient_checkpointing=True)
    offloaded = train(tiny_llama, tmp_path / "on the host", gradient_checkpointing=True, activation_offloading=True)
    assert losses(offloaded) == losses(checkpointed)


def test_a_run_with_compiled_blocks_trains_alike(tiny_llama, tmp_path, plain):
    run = train(tiny_llama, tmp_path, torch_compile=True)
    assert losses(run) == pytest.approx(losses(plain), rel=0.02)
    assert [event for event in run.events() if event["type"] == "compile"]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_is_that_of_the_cpu(dtype, window):
    torch.manual_seed(0)
    wanted = [torch.randn(1, heads, BORDERS[-1], 64, dtype=torch.float64) for heads in (8, 2, 2)]
    inputs = [tensor.to(DEVICE, dtype) for tensor in wanted]
    borders = torch.tensor(BORDERS, dtype=torch.int32)
    found = []
    for tensors in (wanted, inputs):
        for tensor in tensors:
            tensor.requires_grad_()
        output, _ = packed_attention(
            nn.Module(), *tensors, attention_mask=None, sliding_window=window, cu_seq_lens_q=borders
        )
        (output.double() * torch.linspace(-1, 1, 64, device=output.device)).sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in tensors)])
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert relative(ours, theirs) < tolerance


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_cpu(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, dtype=torch.float64), torch.randn(1000, 64, dtype=torch.float64) / 8
    labels = torch.randint(1000, (300,))
    labels[::3] = -100
    found = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        x = hidden.clone().to(device, kind).requires_grad_()
        loss = linear_cross_entropy(x, weight.to(device, kind), labels.to(device)).loss
        loss.backward()
        found.append((loss.detach(), x.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert relative(ours, theirs) < (1e-5 if dtype is torch.float32 else 0.02)


def gradients(model: LlamaForCausalLM, offload: bool) -> list[Tensor]:
    """Of all LoRA's parameters, for one packed row, by the kernels of the model's device."""
    device = model.device
    prepare_for_training(model)
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(device) / 10
        if "lora_A" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(device) / 10
    loss_model = CausalLMLoss(model).train()
    ids = torch.randint(256, (1, BORDERS[-1]), generator=torch.Generator().manual_seed(4)).to(device)
    labels = ids.clone()
    labels[0, list(BORDERS[:-1])] = -100
    lengths = [end - start for start, end in itertools.pairwise(BORDERS)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    with fused(model) as blocks:
        assert not blocks.refused
        assert blocks.counts["mlp"] == 3
        row = (ids, labels, positions, torch.tensor(BORDERS, dtype=torch.int32), max(lengths))
        if offload:
            checkpoint_blocks(model, len(blocks_of(model)))
            with offloaded_checkpoints(model, CudaLane(device), min_bytes=0):
                loss_model(*row).loss.backward()
        else:
            loss_model(*row).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_fused_model_are_those_of_the_cpu(dtype, offload):
    base = llama()
    wanted = gradients(copy.deepcopy(base).double(), offload=False)
    found = gradients(base.to(DEVICE, dtype), offload)
    errors = [relative(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
    assert max(errors) < (1e-4 if dtype is torch.float32 else 0.06)
