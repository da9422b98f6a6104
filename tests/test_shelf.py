"""Labels, notes, differences and the trash: files and settings, no training."""

import json

import pytest

from nbtune import shelf
from nbtune.errors import RunError
from nbtune.peft import IA3Config, LoraConfig
from nbtune.shelf import About
from nbtune.spec import RunSpec


class Has:
    def __init__(self, **parts):
        self.spec = RunSpec(**parts)


def made(folder, name):
    path = folder / name
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text("model: smollm2-135m-instruct\n")
    return path


def test_a_label_is_one_line_and_a_note_keeps_its_lines(tmp_path):
    assert shelf.read_about(tmp_path) == About()
    shelf.write_about(tmp_path, About(" a \n label ", "first\nsecond\n"))
    assert shelf.read_about(tmp_path) == About("a label", "first\nsecond")
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"label": "a"}'])
def test_a_damaged_label_is_named(tmp_path, text):
    (tmp_path / "about.json").write_text(text)
    with pytest.raises(RunError, match=r"about\.json"):
        shelf.read_about(tmp_path)


def test_too_long_a_label_is_refused_and_changes_nothing(tmp_path):
    shelf.write_about(tmp_path, About("good"))
    with pytest.raises(RunError, match="81 characters"):
        shelf.write_about(tmp_path, About("x" * 81))
    assert json.loads((tmp_path / "about.json").read_text())["label"] == "good"


def test_only_what_differs():
    runs = [Has(), Has(training={"learning_rate": 1e-3}), Has(method=LoraConfig(target_modules="all-linear", r=16))]
    found = shelf.difference(runs)
    assert found == {"method.r": [8, 8, 16], "training.learning_rate": [2e-4, 1e-3, 2e-4]}
    assert shelf.difference(runs[:1]) == shelf.difference([]) == {}


def test_of_two_methods_their_defaults_are_left_out():
    lora, ia3 = Has(method=LoraConfig(r=4, target_modules=["q_proj"])), Has(method=IA3Config())
    found = shelf.difference([lora, ia3, Has(method="full")])
    assert found["method.peft_type"] == ["LORA", "IA3", "full"]
    assert found["method.r"] == [4, None, None]
    assert "method.lora_alpha" not in found
    assert len(found) < 6


def test_what_is_thrown_away_comes_back(tmp_path):
    path = made(tmp_path, "heron")
    thrown = shelf.discard(path)
    assert not path.exists()
    assert shelf.in_trash(tmp_path) == [thrown]
    assert shelf.restore(thrown) == path
    assert (path / "spec.yaml").exists()
    assert shelf.in_trash(tmp_path) == []


def test_two_of_one_name_lie_in_the_trash_beside_each_other(tmp_path):
    first = shelf.discard(made(tmp_path, "heron"))
    second = shelf.discard(made(tmp_path, "heron"))
    assert first != second
    made(tmp_path, "heron")
    with pytest.raises(RunError, match="already"):
        shelf.restore(first)
    assert shelf.empty_trash(tmp_path) == 2
    assert (tmp_path / "heron").exists()
    assert shelf.empty_trash(tmp_path) == 0
