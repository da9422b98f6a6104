"""llama.cpp's own word on what is exported: 20 prompts, answered greedily by nbtune, transformers and llama.cpp.

Skipped where llama-cpp-python is missing, which is a C++ build of minutes: `uv sync --extra llama-cpp`.

Weights in f16 and llama.cpp's arithmetic in f16 move logits a little. Two that are nearer than that may change places:
where an answer parts from nbtune's, nbtune's own two logits must be nearer than twice the largest move that was
measured over all prompts and answers, and at most two of 20 answers may. What was found is printed (`-rP`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import nbtune as nt
from nbtune.infer.engine import Engine
from nbtune.infer.sampling import Sampling
from nbtune.models import load
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.spec import ModelSpec, RunSpec

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: `uv sync --extra llama-cpp` compiles it, in ten minutes"
)
pytestmark = pytest.mark.slow

NEW_TOKENS = 24
BASE = ModelSpec(dtype="float32")
RELATIVE = 0.01  # |difference| / |logits|, at most: half of what the proof of f16 allows
PARTED = 2  # of 20 answers, at most
FUNCTIONS = (
    "os.path.join textwrap.dedent shutil.which json.loads re.sub itertools.chain functools.partial math.isclose "
    "random.choice pathlib.Path.glob"
).split()
QUESTIONS = [
    *(f"What does `{name}` do in Python?" for name in FUNCTIONS),
    "Write one sentence about the sea.",
    "Count from 1 to 12.",
    "Translate to French: I'd like 250 g of bread — and café, please!",
    "def add(a, b):\n    return a + b\n\nExplain   this code.",
    "Who wrote Hamlet?",
    "Name three colours.",
    "What is 17 plus 25?",
    "Is the Earth flat?",
    "Give me a recipe for pancakes.",
    "日本の首都はどこですか？ 🙂",
]

Told = list[list[int]]  # the tokens of each answer, its end of turn included


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo, in fewer and shorter steps."""
    spec = RunSpec(
        data="stdlib-docs",
        method=LoraConfig(r=16, lora_alpha=32),
        training={
            "learning_rate": 1e-3,
            "max_steps": 10,
            "max_length": 128,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1,
            "eval_steps": 0,
        },
        tracking={"mlflow": False},
    )
    run = nt.train(spec, runs_dir=tmp_path_factory.mktemp("runs"))
    run.wait()
    return run


@pytest.fixture(scope="module")
def asked(run: Any) -> tuple[Told, Told, Told]:
    """The prompts, what nbtune answers with the adapter, and what it answers without."""
    engine = Engine(BASE, {"demo": run.path / "adapter"}, device="cpu")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [engine.prompt("demo", chat) for chat in chats]
    told: dict[str, Told] = {}
    for column in ("demo", "base"):
        greedy = Sampling(temperature=0)
        answers = [engine.answer(column, chat, greedy, max_new_tokens=NEW_TOKENS, seed=0) for chat in chats]
        tokens: dict[int, list[int]] = {id(answer): [] for answer in answers}
        for answer, delta in engine.write(answers):
            assert delta.token is not None
            tokens[id(answer)].append(delta.token)
        told[column] = list(tokens.values())
    return prompts, told["demo"], told["base"]


@pytest.fixture(scope="module")
def adapted(run: Any) -> PeftModel:
    return PeftModel.from_pretrained(load(BASE, device="cpu").model, run.path / "adapter").eval()


@pytest.fixture(scope="module")
def merged(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nt.export(run, "gguf", tmp_path_factory.mktemp("gguf") / "demo.gguf").path


class LlamaCpp:
    """A file as llama.cpp reads it."""

    def __init__(self, path: Path, lora: Path | None = None) -> None:
        settings = {"n_ctx": 512, "n_threads": 2, "n_threads_batch": 2, "logits_all": True, "verbose": False}
        self.name = f"llama.cpp, {path.name}{f' and {lora.name}' if lora else ''}"
        self.model = llama_cpp.Llama(str(path), lora_path=str(lora) if lora else None, **settings)

    def answer(self, prompt: list[int]) -> list[int]:
        told: list[int] = []
        for token in self.model.generate(prompt, temp=0, top_k=1, repeat_penalty=1.0, reset=True):
            told.append(token)
            if token == self.model.token_eos() or len(told) == NEW_TOKENS:
                break
        return told

    def logits(self, ids: list[int]) -> torch.Tensor:  # [T, V]
        self.model.reset()
        self.model.eval(ids)
        return torch.tensor(self.model.scores[: len(ids)])


class Transformers:
    """A model that plain transformers computes: a file, or the one in memory."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def answer(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 2}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:  # [T, V]
        return self.model(input_ids=torch.tensor([ids])).logits[0].float()


def require_same(prompts: Told, expected: Told, ours: Transformers, other: LlamaCpp | Transformers) -> None:
    """The other's answers are these, token for token, up to near-ties; its logits are near ours."""
    error = size = largest = 0.0
    gaps, lines = [], []
    for question, prompt, answer in zip(QUESTIONS, prompts, expected, strict=True):
        ids = [*prompt, *answer[:-1]]
        found, wanted = other.logits(ids), ours.logits(ids)
        error += float((found - wanted).double().square().sum())
        size += float((wanted - wanted.mean(dim=-1, keepdim=True)).double().square().sum())
        largest = max(largest, float((found - wanted).abs().max()))
        told = other.answer(prompt)
        if told != answer:
            at = next(index for index, pair in enumerate(zip(answer, told, strict=False)) if pair[0] != pair[1])
            here = wanted[len(prompt) - 1 + at]
            gaps.append(float(here[answer[at]] - here[told[at]]))
            lines.append(f"{question!r}: token {at} is {told[at]}, in nbtune {answer[at]} by {gaps[-1]:.4f}")
    relative = (error / size) ** 0.5
    found_out = "; ".join(
        [f"{other.name}: largest {largest:.3f}, relative {relative:.5f}, parted {len(lines)}", *lines]
    )
    print(found_out)  # noqa: T201 - for -rP
    assert relative < RELATIVE, found_out
    assert len(lines) <= PARTED, found_out
    assert all(gap < 2 * largest for gap in gaps), found_out


def test_llama_cpp_reads_text_as_the_model_does(asked: Any, merged: Path) -> None:
    engine = Engine(BASE, device="cpu")
    model = llama_cpp.Llama(str(merged), vocab_only=True, verbose=False)
    for question, prompt in zip(QUESTIONS, asked[0], strict=True):
        text = str(engine.tokenizer.decode(prompt))
        assert question in text
        assert model.tokenize(text.encode(), add_bos=False, special=True) == prompt
    assert model.metadata["tokenizer.chat_template"] == engine.tokenizer.chat_template
    model.close()


def test_f16_answers_as_nbtune(asked: Any, adapted: PeftModel, merged: Path) -> None:
    prompts, with_adapter, without = asked
    assert sum(one != other for one, other in zip(with_adapter, without, strict=True)) >= 10  # the adapter is heard
    ours = Transformers(adapted, "nbtune")
    read = AutoModelForCausalLM.from_pretrained(merged.parent, gguf_file=merged.name, dtype=torch.float32)
    require_same(prompts, with_adapter, ours, Transformers(read, "transformers"))
    require_same(prompts, with_adapter, ours, LlamaCpp(merged))


def test_the_adapter_beside_its_base(asked: Any, adapted: PeftModel, run: Any, tmp_path: Path) -> None:
    """As `llama-cli -m base.gguf --lora lora.gguf`."""
    prompts, with_adapter, without = asked
    lora = nt.export(run, "gguf-lora", tmp_path / "lora.gguf").path
    empty = get_peft_model(load(BASE, device="cpu").model, LoraConfig(r=1, target_modules=["q_proj"]))  # B is zero
    empty.save_pretrained(tmp_path / "empty")
    plain = nt.export(tmp_path / "empty", "gguf", tmp_path / "base.gguf").path
    ours = Transformers(adapted, "nbtune")
    with adapted.disable_adapter():
        require_same(prompts, without, ours, LlamaCpp(plain))
    require_same(prompts, with_adapter, ours, LlamaCpp(plain, lora))
