"""AdaLoRA: PEFT's losses through the whole schedule, the ranks that are left, the files of a trained adapter."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from grid import MethodTests, close, disturb, inputs, outputs
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import AdaLoraConfig, PeftModel, get_peft_model

SMALL = {"init_r": 6, "target_r": 2, "total_step": 20}


class TestAdaLora(MethodTests):
    thorough = True
    config, oracle = AdaLoraConfig, peft.AdaLoraConfig
    noise = 0.3
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], **SMALL}),
        ("llama", {"target_modules": ["v_proj"], "orth_reg_weight": 0.1, "modules_to_save": ["lm_head"], **SMALL}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all", **SMALL}),
        ("t5", {"target_modules": ["q", "wo"], "lora_alpha": 16, **SMALL}),
        ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only", **SMALL}),
    ]

    def test_ten_steps_give_the_losses_of_peft(self, make, case, tmp_path):
        """With a task: without one PEFT forgets the penalty; with one it cannot compute a frozen adapter's loss."""
        tasks = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
        case = (case[0], {**case[1], "task_type": tasks[case[0]]})
        super().test_ten_steps_give_the_losses_of_peft(make, case, tmp_path)
        with pytest.raises(AttributeError, match="trainable_adapter_name"):
            peft.PeftModel.from_pretrained(make(case[0]), tmp_path)(**inputs(case[0]))


def scheduled_losses(model, name: str, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    seen = []
    for step in range(steps):
        loss = model(**inputs(name)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


SCHEDULES = [
    {"total_step": 14, "tinit": 2, "tfinal": 4},
    {"total_step": 14, "tinit": 0, "tfinal": 3, "deltaT": 3},
    {"total_step": 12},
]


@pytest.fixture(params=range(len(SCHEDULES)))
def trained(request, make, tmp_path):
    """The same adapter, trained by PEFT and here."""
    schedule = SCHEDULES[request.param]
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_r": 6, "target_r": 2, "orth_reg_weight": 0.1}
    settings |= {"task_type": "CAUSAL_LM", "bias": "lora_only", "trainable_token_indices": [5, 6], **schedule}
    theirs = peft.get_peft_model(make("llama"), peft.AdaLoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "start")
    ours = PeftModel.from_pretrained(make("llama"), tmp_path / "start", is_trainable=True)
    steps = schedule["total_step"] + 2
    return ours, theirs, scheduled_losses(ours, "llama", steps), scheduled_losses(theirs, "llama", steps)


def test_the_whole_schedule_gives_the_losses_of_peft(trained):
    _, _, mine, expected = trained
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), atol=1e-4, rtol=0)
    assert mine[-1] < mine[0]


def test_a_trained_file_holds_the_ranks_that_are_left_as_in_peft(trained, make, tmp_path):
    ours, theirs, *_ = trained
    for who, model in (("ours", ours.eval()), ("theirs", theirs.eval())):
        model.save_pretrained(tmp_path / who)
    patterns = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())["rank_pattern"] for who in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 2 * 9
    for who in ("ours", "theirs"):
        loaded = PeftModel.from_pretrained(make("llama"), tmp_path / who)
        close(outputs(loaded, "llama"), outputs(ours, "llama"), atol=1e-4 if who == "theirs" else 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(input_ids=inputs("llama")["input_ids"]).logits, outputs(ours, "llama"))
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_ranks_of_a_loaded_adapter_are_taken_on(make, tmp_path):
    """A trimmed adapter trained again: its pattern still counts from the very first ranks."""
    first = get_peft_model(make("llama"), AdaLoraConfig(target_modules=["q_proj"], init_r=6, target_r=3, total_step=6))
    scheduled_losses(first, "llama", 6)
    first.save_pretrained(tmp_path / "first")
    config = tmp_path / "first" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_r": 1}))
    second = PeftModel.from_pretrained(make("llama"), tmp_path / "first", is_trainable=True)
    scheduled_losses(second, "llama", 6)
    second.save_pretrained(tmp_path / "second")
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())["rank_pattern"]
        for name in ("first", "second")
    )
    assert sum(map(sum, before.values())) == 9
    assert sum(map(sum, after.values())) == 3
    assert all(old or not new for key in before for old, new in zip(before[key], after[key], strict=True))
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "second")
    close(outputs(loaded, "llama"), outputs(second.eval(), "llama"))


def test_adapters_of_other_ranks_serve_one_batch(make):
    ours = get_peft_model(make("llama"), AdaLoraConfig(target_modules=["q_proj"], **SMALL), "a")
    ours.add_adapter("b", AdaLoraConfig(target_modules=["q_proj"], **SMALL | {"init_r": 4}))
    disturb(ours, 0.3)
    expected = []
    for row, name in enumerate(["b", "a", "b", "a"]):
        ours.set_adapter(name)
        expected.append(outputs(ours.eval(), "llama")[row])
    close(outputs(ours, "llama", adapter_names=["b", "a", "b", "a"]), torch.stack(expected))


def test_a_convolution_is_that_of_peft(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2)), torch.randn(3, 4, 9, 9)
    plain = net(x)
    ours = get_peft_model(net, AdaLoraConfig(target_modules=["0"], **SMALL)).eval()
    disturb(ours, 0.3)
    ours.save_pretrained(tmp_path)
    expected = ours(x)
    assert (expected - plain).abs().max() > 0.01
    base = nn.Sequential(ours.unload()[0])
    close(peft.PeftModel.from_pretrained(base, tmp_path)(x), expected)


def test_the_penalty_is_that_of_the_paper(make):
    ours = get_peft_model(make("llama"), AdaLoraConfig(target_modules=["q_proj"], orth_reg_weight=0.25, **SMALL))
    penalty = ours.penalty()
    assert penalty is not None
    total = torch.zeros((), dtype=torch.float64)
    for adapter in ours._adapters("default").values():
        A, B = adapter.lora_A.double(), adapter.lora_B.double()
        total += (A @ A.T - torch.eye(6)).norm() + (B.T @ B - torch.eye(6)).norm()
    torch.testing.assert_close(penalty.double(), 0.25 * total / 6, atol=1e-6, rtol=0)


def test_settings_that_cannot_be(make):
    with pytest.raises(AdapterError, match="tinit 4 and tfinal 6 leave nothing of total_step 10"):
        AdaLoraConfig(total_step=10, tinit=4, tfinal=6)
    with pytest.raises(AdapterError, match="total_step is 0; it must be more than 0"):
        AdaLoraConfig(total_step=0)
    with pytest.raises(AdapterError, match="AdaLoRA needs total_step"):
        get_peft_model(make("llama"), AdaLoraConfig())
    with pytest.raises(AdapterError, match="use_dora is not there yet"):
        AdaLoraConfig(use_dora=True)
    with pytest.warns(UserWarning, match="does not use r"):
        AdaLoraConfig(r=4)
