"""What check finds comes with changes that mend it: applied, the problem is gone."""

import pytest

from nbtune import check as find_problems
from nbtune.check import Remedy, _too_large
from nbtune.models import default_device
from nbtune.plan import plan
from nbtune.spec import RunSpec


@pytest.fixture(scope="module")
def rows():
    return [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]


CASES = [
    ({"max_length": 100_000}, "context of 8192", "shorten to 8,192"),
    ({"target_modules": ["q_porj"]}, "No such module", "adapt all linear layers"),
    ({"rank_pattern": {"q_porj": 4}}, "No such module", "one for all modules"),
    ({"init_lora_weights": "eva"}, "EVA", "use the usual first weights"),
    ({"optim": "paged_adamw_8bit"}, "Paging needs a GPU", "use adamw_8bit"),
    ({"optim": "paged_adamw_32bit"}, "Paging needs a GPU", "use adamw_torch_fused"),
    ({"activation_offloading": True, "gradient_checkpointing": False}, "would do nothing", "compute layers again"),
    ({"mlflow": True, "tracking_uri": "http://127.0.0.1:9"}, "MLflow", "do without MLflow"),
    ({"mlflow": True, "tracking_uri": "http://127.0.0.1:9"}, "MLflow", "use a file in the runs folder"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "title", "label"), CASES)
def test_a_remedy_mends_its_problem(rows, changes, title, label):
    if "GPU" in title and default_device().type != "cpu":
        pytest.skip("this machine has a GPU")
    spec = RunSpec(data=rows).updated(**{"mlflow": False, "max_length": 64, **changes})
    problem = next(found for found in find_problems(spec) if title.lower() in f"{found.title} {found.message}".lower())
    remedy = next(remedy for remedy in problem.remedies if remedy.label == label)
    mended = spec.updated(**remedy.changes)
    assert mended != spec
    assert problem.title not in [found.title for found in find_problems(mended)]


def test_4_bits_on_a_cpu_with_odd_rows_can_be_8(tmp_path):
    if default_device().type != "cpu":
        pytest.skip("this machine has a GPU")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    spec = RunSpec(model={"name": str(tmp_path), "load_in_4bit": True}, tracking={"mlflow": False})
    from nbtune.check import _model

    (problem,) = [found for found in _model(spec) if found.setting == "model.load_in_4bit"]
    assert [remedy.label for remedy in problem.remedies] == ["use 8-bit", "use 16-bit"]
    for remedy in problem.remedies:
        assert not [found for found in _model(spec.updated(**remedy.changes)) if found.setting == "model.load_in_4bit"]


def test_remedies_for_too_little_memory_make_it_fit():
    spec = RunSpec(training={"max_length": 2048, "per_device_train_batch_size": 2})
    there = plan(spec).peak_bytes
    least = plan(spec, available_bytes=1)  # laid out as small as it can be
    available = least.peak_bytes - 1_000_000
    assert available < there
    problem = _too_large(spec, plan(spec, available_bytes=available))
    assert "largest part is" in problem.message
    labels = [remedy.label for remedy in problem.remedies]
    assert any(label.startswith("shorten to 1,024 (") for label in labels)
    for remedy in problem.remedies:
        assert plan(spec.updated(**remedy.changes), available_bytes=available).fits


def test_full_training_that_does_not_fit_can_be_lora():
    spec = RunSpec(method="full", training={"max_length": 128})
    available = plan(spec, available_bytes=1).peak_bytes - 200_000_000
    problem = _too_large(spec, plan(spec, available_bytes=available))
    assert any(remedy.changes == {"method": "lora"} for remedy in problem.remedies)
    assert isinstance(problem.remedies[0], Remedy)
