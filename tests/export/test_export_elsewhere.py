"""A merged model in a Python that has no nbtune: plain transformers gives the answers that nbtune gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import nbtune as nt
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import Sampling
from nbtune.models import load
from nbtune.peft import LoraConfig, get_peft_model
from nbtune.spec import ModelSpec

NEW_TOKENS = 8
QUESTIONS = [f"What does `{name}` do in Python? {name[::-1]}" for name in dir(str)[-20:]]
PLAIN = """
import importlib.abc
import json
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("nbtune"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
try:
    import nbtune
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("nbtune can be imported")

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, questions, new_tokens = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder)
chats = [[{"role": "user", "content": question}] for question in questions]
batch = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)
written = model.generate(**batch, do_sample=False, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id)
print(json.dumps(written[:, batch["input_ids"].shape[1]:].tolist()))
"""


def told_by_nbtune(model: ModelSpec, adapter: Path) -> list[list[int]]:
    engine, greedy = Engine(model, {"adapter": adapter}, device="cpu"), Sampling(temperature=0)
    answers = [
        engine.answer(
            "adapter", [{"role": "user", "content": question}], greedy, max_new_tokens=NEW_TOKENS, seed=0
        )
        for question in QUESTIONS
    ]  # fmt: skip
    tokens: dict[int, list[int]] = {id(answer): [] for answer in answers}
    for answer, delta in engine.write(answers):
        assert delta.token is not None
        tokens[id(answer)].append(delta.token)
    return list(tokens.values())


def test_plain_transformers_answers_as_nbtune(tiny_model: Path, tmp_path: Path) -> None:
    base = ModelSpec(name=str(tiny_model), dtype="float32")
    torch.manual_seed(1)
    adapted = get_peft_model(load(base, device="cpu").model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    folder = nt.export(tmp_path / "adapter", "merged", tmp_path / "out", dtype="f32").path

    plain = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN],
        input=json.dumps([str(folder), QUESTIONS, NEW_TOKENS]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    expected, found = told_by_nbtune(base, tmp_path / "adapter"), json.loads(plain.stdout)
    assert len(expected) == len(QUESTIONS) == 20
    assert len({tuple(answer) for answer in expected}) > 5  # they are not all the same
    assert [answer[: len(one)] for one, answer in zip(expected, found, strict=True)] == expected
