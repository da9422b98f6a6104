"""A run in other forms gives the same RunSpec back: Python, a command in a real shell, YAML, a papermill notebook."""

import dataclasses
import json
import subprocess
import typing
from pathlib import Path

import nbformat
import pytest
import typer

import nbtune as nt
from nbtune import cli, echo
from nbtune.errors import NbtuneError, SpecError
from nbtune.notebook import execute, parameters
from nbtune.peft.config import PeftType, config_class
from nbtune.run import Run, runs
from nbtune.spec import DataSpec, ModelSpec, RunSpec, TrackingSpec, TrainingSpec, settings
from nbtune.sweep.notebook import SweepNotebook

TRAIN = typer.main.get_command(cli.app).commands["train"]
PARTS = {"model": ModelSpec, "data": DataSpec, "training": TrainingSpec, "tracking": TrackingSpec}
SPECS = {
    "defaults": RunSpec(),
    "training": RunSpec().updated(max_steps=5, learning_rate=1e-5, seed=3, **{"data.seed": 4}),
    "quoting": RunSpec(model="it's a/model", data="a \"file\" $HOME `x`.jsonl").updated(experiment="ä\nb; rm -rf"),
    "layers": RunSpec(method={"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [3, 4, 5, 6, 7]}),
    "regex": RunSpec(method={"target_modules": r".*layers\.(1[5-9]|2\d)\.mlp\.(gate|up)_proj"}),
    "patterns": RunSpec(method=nt.LoraConfig(rank_pattern={r"^q_proj$": 4}, init_lora_weights="pissa_niter_4")),
    "a file's facts": RunSpec(method=nt.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="base", r=2)),
    "oft": RunSpec(method=nt.OFTConfig(oft_block_size=8, target_modules=["q_proj"])),
    "prefix": RunSpec(method=nt.PrefixTuningConfig(num_virtual_tokens=7)),
    "data": RunSpec(
        model={"name": "m", "chat_template": "{% for m in messages %}\n{{ m }}'\"{% endfor %}"},
        data={"source": "x", "columns": {"prompt": "{q}\n: {c}"}, "recipe": [{"step": "length", "at_most": 512}]}),
    "full": RunSpec(method="full", model={"name": "m", "dtype": "float32"}, data={"source": "d", "eval_fraction": 0.1}),
    "preset": RunSpec(method="ia3").preset("least memory"),
}  # fmt: skip


def named(function):
    return pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])(function)


def parsed(words):
    """The spec that `nbtune train` would train with these words after it."""
    given = TRAIN.make_context("train", list(words)).params
    return cli._spec(*(given[name] for name in ("spec_file", "model", "data", "method", "preset")), given["set_"] or [])


def words_of(command):
    """A command's words as a shell splits them."""
    split = subprocess.run(
        ["sh", "-c", f'nbtune() {{ printf "%s\\0" "$@"; }}\n{command}'], capture_output=True, text=True, check=True
    )
    return split.stdout.split("\0")[:-1]


def from_notebook(spec, **given):
    """The spec that a written notebook makes, with other values for some of its parameters."""
    code = [cell.source for cell in echo.notebook(spec).cells if cell.cell_type == "code"]
    names: dict = {}
    exec(code[0], names)
    assert given.keys() <= names.keys()
    names |= given
    exec(code[1].replace("print(nt.plan(spec))", ""), names)
    return names["spec"]


@named
def test_python(spec):
    names = {}
    exec(echo.python(spec).partition("run = ")[0], names)
    assert names["spec"] == spec


@named
def test_a_command_through_a_shell(spec):
    first, *words = words_of(echo.command(spec))
    assert first == "train"
    assert parsed(words) == spec


@named
def test_yaml(spec, tmp_path):
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert parsed([str(tmp_path / "spec.yaml")]) == spec


@named
def test_a_notebook(spec):
    nbformat.validate(echo.notebook(spec))
    assert from_notebook(spec) == spec


@pytest.mark.parametrize("method", ["lora", "loha", "oft", "ia3", "full"])
def test_a_sweep_over_the_method_foretells_what_the_notebook_does(tmp_path, method):
    """Each method gets what it has of the adapter's settings, and each trial is the run that was previewed."""
    spec = RunSpec(method={"r": 4, "lora_dropout": 0.1, "use_rslora": True}).updated(max_steps=7)
    made = from_notebook(spec, method=method)
    swept = SweepNotebook(echo.write_notebook(spec, tmp_path))
    assert swept.spec(swept.parameters({"method": method})) == made
    assert made.training.max_steps == 7
    assert made.method_name.lower().startswith(method)
    if method in ("lora", "loha"):
        assert made.method.r == 4


def test_only_what_differs_is_said():
    assert echo.command(RunSpec()) == "nbtune train \\\n  --model smollm2-135m-instruct \\\n  --data stdlib-docs"
    text = echo.python(RunSpec().updated(max_steps=8))
    assert "'max_steps': 8" in text
    assert "learning_rate" not in text


def test_rows_in_memory_are_said_in_python_and_saved_for_the_rest(tmp_path):
    rows = [{"prompt": "a", "completion": "ö"}, {"prompt": "c", "completion": "d"}]
    spec = RunSpec(data=rows).updated(eval_fraction=0.5)
    names = {"rows": rows}
    exec(echo.python(spec).partition("run = ")[0], names)
    assert names["spec"] == spec
    assert names["spec"].data.rows == spec.data.rows
    for form in (echo.command, echo.notebook):
        with pytest.raises(SpecError, match="only in this notebook"):
            form(spec)
    saved = echo.save_rows(spec, tmp_path)
    assert [json.loads(line) for line in Path(saved.data.source).read_text().splitlines()] == rows
    assert saved.updated(**{"data.source": "x"}) == spec.updated(**{"data.source": "x"})
    assert parsed(words_of(echo.command(saved))[1:]) == saved
    assert echo.save_rows(spec, tmp_path).data.source != saved.data.source


def test_a_written_notebook_overwrites_nothing(tmp_path):
    first = echo.write_notebook(RunSpec(), tmp_path)
    first.write_text("mine")
    second = echo.write_notebook(RunSpec(), tmp_path)
    assert first.name == "train-lora-smollm2-135m-instruct.ipynb"
    assert second.name == "train-lora-smollm2-135m-instruct-2.ipynb"
    assert first.read_text() == "mine"
    assert parameters(second)["max_steps"] == -1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name])


@pytest.mark.slow
def test_papermill_runs_the_written_notebook_and_nbtune_the_command(tmp_path, monkeypatch):
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
    (tmp_path / "it's rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = RunSpec(
        data={"source": str(tmp_path / "it's rows.jsonl"), "eval_fraction": 0.2},
        method={"r": 2, "target_modules": r".*layers\.(1[5-9]|2\d)\.mlp\.(gate|up)_proj"},
        training={"max_steps": 9, "max_length": 64, "eval_steps": 0, "gradient_accumulation_steps": 1},
        tracking={"mlflow": False},
    ).updated(eval_samples=0)
    written = echo.write_notebook(spec, tmp_path)
    given = {"max_steps": 1, "runs_dir": str(tmp_path / "runs"), "run_id": "noted"}
    output = execute(written, tmp_path / "out.ipynb", given)
    assert Run.open("noted", runs_dir=tmp_path / "runs").spec == spec.updated(max_steps=1)
    assert output.stat().st_size < 1_000_000

    command = echo.command(spec.updated(max_steps=1)) + f" --runs-dir '{tmp_path / 'shell'}'"
    monkeypatch.setattr("sys.argv", ["nbtune", *words_of(command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    (run,) = runs(tmp_path / "shell")
    assert run.spec == spec.updated(max_steps=1)
    assert run.status == "finished"


def declared(method):
    """Every field of a RunSpec with this method, from the classes that declare them, and its default."""
    found = {
        f"{part}.{name}": info.get_default() for part, cls in PARTS.items() for name, info in cls.model_fields.items()
    }
    if method != "full":
        default = RunSpec(method=method).method
        fields = [field for field in dataclasses.fields(config_class(method)) if "help" in field.metadata]
        found |= {f"method.{field.name}": vars(default)[field.name] for field in fields}
    return found


def other_value(setting):
    """A value that a setting may have and that is not its default, or the default where there is no simple one."""
    default = setting.default
    if setting.choices is not None:
        return next(choice for choice in setting.choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return type(default)(default + 1 if setting.le is None and setting.lt is None else default / 2)
    if list[str] in (setting.type, *typing.get_args(setting.type)):
        return ["other"]
    if str in (setting.type, *typing.get_args(setting.type)):
        return "other"
    return default


@pytest.mark.parametrize("method", [*PeftType, "full"])
def test_every_field_is_reachable_in_the_form_the_command_and_the_notebook(method):
    from nbtune_widgets.specform import SpecForm

    spec = RunSpec(method=method)
    paths = declared(method)
    form = SpecForm(lambda part, name: None)
    form.set(method=method)
    assert form.fields.keys() == paths.keys()
    changed = 0
    for setting in settings(spec.method):
        if method != "LORA" and setting.part != "method":  # the same with every method
            continue
        value = other_value(setting)
        try:
            expected = spec.updated(**{setting.path: value})
        except NbtuneError:  # it does not go with the defaults of others
            value = paths[setting.path]
            expected = spec.updated(**{setting.path: value})
        changed += expected != spec
        part, name = setting.path.split(".")
        plain = expected.to_dict()[part].get(name)
        form.fields[setting.path].value = getattr(getattr(expected, part), name)
        assert form.spec == expected, setting.path
        form.fields[setting.path].set_default()
        words = ["--data", spec.data.source, "--method", method.lower(), "--set", f"{setting.path}={echo._yaml(plain)}"]
        if setting.path != "data.source":
            assert parsed(words) == expected, setting.path
        if setting.path not in ("model.name", "data.source"):
            assert from_notebook(spec, settings={setting.path: plain}) == expected, setting.path
    assert form.spec == spec
    if method != "full":
        assert changed > (40 if method == "LORA" else 0)
