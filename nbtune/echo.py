"""The same run in other forms: as Python, as a command, as a papermill notebook; YAML is `RunSpec.to_yaml`.

    print(python(spec)); print(command(spec))
    write_notebook(spec, Path())      # a new file in this folder, with a cell of parameters

Each form says what differs from the defaults, and gives the same RunSpec back. Rows given in memory have no name that a
command or a file could say: `save_rows` gives them one.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nbtune import _files
from nbtune.errors import SpecError
from nbtune.spec import DataSpec, RunSpec, Setting, settings

if TYPE_CHECKING:
    from nbformat import NotebookNode

PARTS = ("model", "data", "training", "tracking")


def changes(spec: RunSpec) -> dict[str, Any]:
    """The settings, by path, in which a spec differs from one with the same method and the defaults."""
    base = RunSpec.from_dict({"method": _kind(spec)}).to_dict()
    values = spec.to_dict()
    changed: dict[str, Any] = {}
    for part in (*PARTS, "method"):
        if isinstance(values[part], dict):
            names = dict.fromkeys([*values[part], *base[part]])
            given = {name: values[part].get(name) for name in names}
            changed |= {f"{part}.{name}": value for name, value in given.items() if value != base[part].get(name)}
    return changed


def python(spec: RunSpec) -> str:
    """The run as a program: what differs from the defaults, and nothing else. Rows in memory are called `rows`."""
    arguments = [f"    model={_part(spec, 'model', 'name', 'nt.ModelSpec')},"]
    if spec.data.rows is None:
        arguments.append(f"    data={_part(spec, 'data', 'source', 'nt.DataSpec')},")
    else:
        given = _of_part(spec, "data")
        given.pop("source")
        rows = _call("nt.DataSpec.from_rows", {"rows": _Code("rows"), **given}) if given else "rows"
        arguments.append(f"    data={rows},  # the rows that were given to this wizard")
    if spec.method == "full":
        arguments.append('    method="full",')
    else:
        of_config = type(spec.method)()
        values, default = spec.method.to_dict(), of_config.to_dict()
        changed = {name: value for name, value in values.items() if value != default.get(name)}
        arguments.append(f"    method={_call(f'nt.{type(spec.method).__name__}', changed)},")
    others = {part: _of_part(spec, part) for part in ("training", "tracking")}
    arguments += [f"    {part}={_dict(changed)}," for part, changed in others.items() if changed]
    return "\n".join(
        ["import nbtune as nt", "", "spec = nt.RunSpec(", *arguments, ")", "run = nt.train(spec)", "run.watch()"]
    )


def command(spec: RunSpec) -> str:
    """The run as a line of a POSIX shell. Raises SpecError for rows in memory, which a shell cannot hold."""
    _require_a_source(spec)
    words = [f"--model {shlex.quote(spec.model.name)}", f"--data {shlex.quote(spec.data.source)}"]
    method = _kind(spec)
    changed = {path: value for path, value in changes(spec).items() if path not in ("model.name", "data.source")}
    if _unnamed(spec):  # facts of an adapter's file, which have no setting
        of_method = {path.split(".", 1)[1]: value for path, value in changed.items() if path.startswith("method.")}
        words.append(f"--set {shlex.quote('method=' + _yaml({'peft_type': method, **of_method}))}")
        changed = {path: value for path, value in changed.items() if not path.startswith("method.")}
    elif method != "LORA":
        words.append(f"--method {method.lower()}")
    names = short_names(spec)
    words += [f"--set {shlex.quote(f'{names[path]}={_yaml(value)}')}" for path, value in changed.items()]
    return " \\\n  ".join(["nbtune train", *words])


def notebook(spec: RunSpec) -> NotebookNode:
    """The run as a notebook for papermill. What is often swept, and what differs from the defaults, is a parameter by
    its name; any other setting goes into `settings`. Raises SpecError for rows in memory.
    """
    from nbformat import v4

    _require_a_source(spec)
    method = _kind(spec)
    changed, unnamed = changes(spec), _unnamed(spec)
    given: Any = method.lower()
    if unnamed:
        given = {"peft_type": method, **{name: changed[f"method.{name}"] for name in unnamed}}
    lines = [f"model = {spec.model.name!r}", f"data = {spec.data.source!r}", f"method = {given!r}"]
    names, values = short_names(spec), spec.to_dict()
    arguments = []
    for setting in settings(spec.method):
        path = setting.path
        if path in ("model.name", "data.source") or not (setting.sweepable or path in changed):
            continue
        name = names[path].replace(".", "_")
        value = values[setting.part].get(setting.name)
        lines.append(f"{name} = {value!r}{_comment(setting)}")
        arguments.append(f"    {path!r}: {name},")
    lines += [
        'settings = {}  # any other setting by its name, such as {"adam_beta2": 0.95}',
        "runs_dir = None  # None: NBTUNE_RUNS, else ./runs",
        "run_id = None  # None: a new name",
    ]
    build = ["import nbtune as nt", "", "chosen = {", *arguments, "}"]
    build += [
        "spec = nt.RunSpec(model=model, data=data, method=method)",
        f"if method != {given!r}:  # another one is given what it has and has not switched off, as OFT its rank",
        "    takes = {setting.path for setting in nt.settings(spec.method) if setting.default}",
        "    chosen = {path: v for path, v in chosen.items() if path in takes or not path.startswith('method.')}",
        "spec = spec.updated(**{**chosen, **settings})",
        "print(nt.plan(spec))",
    ]
    title = f"# {_words(spec)}\n\nWritten by nbtune's wizard. Run all cells, or change parameters on the way:\n\n"
    made = v4.new_notebook(
        cells=[
            v4.new_markdown_cell(title + "    papermill this.ipynb out.ipynb -p max_steps 100"),
            v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]}),
            v4.new_code_cell("\n".join(build)),
            v4.new_code_cell("run = nt.train(spec, runs_dir=runs_dir, run_id=run_id)\nawait run.watch_async()"),
            v4.new_code_cell("run.summary()"),
        ],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    for number, cell in enumerate(made.cells):
        cell["id"] = f"run-{number}"  # nbformat's own are random
    return made


def write_notebook(spec: RunSpec, folder: Path) -> Path:
    """Write `notebook(spec)` into a folder under a new name; nothing is ever overwritten."""
    text = json.dumps(notebook(spec), indent=1, ensure_ascii=False) + "\n"
    return _write_new(folder, f"train-{_words(spec)}", ".ipynb", text)


def save_rows(spec: RunSpec, folder: Path) -> RunSpec:
    """The spec with its rows in a new .jsonl file of the folder. Raises SpecError where they are no plain values."""
    if spec.data.rows is None:
        return spec
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in spec.data.rows)
    except TypeError as error:
        raise SpecError(
            "The rows cannot be written", str(error), "Turn their values into texts and numbers."
        ) from error
    path = _write_new(folder, spec.data.source.replace("memory:", "rows-"), ".jsonl", text)
    data = {**spec.data.model_dump(), "source": str(path)}
    return spec.model_copy(update={"data": DataSpec.model_validate(data)})


def short_names(spec: RunSpec) -> dict[str, str]:
    """The shortest name of each setting that `RunSpec.updated` takes, by its path."""
    known = settings(spec.method)
    count = Counter(setting.name for setting in known)
    short = {setting.path: setting.name if count[setting.name] == 1 else setting.path for setting in known}
    return short | {"training.seed": "seed"}


def _write_new(folder: Path, stem: str, suffix: str, text: str) -> Path:
    """Write a file under the first name that is free: stem, stem-2, stem-3, ..."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")[:80]
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
        try:
            path.touch(exist_ok=False)  # takes the name: no other process can
        except FileExistsError:
            number += 1
            continue
        _files.write_text(path, text)
        return path


def _require_a_source(spec: RunSpec) -> None:
    if spec.data.rows is not None:
        raise SpecError(
            "The rows are only in this notebook",
            "A command or another notebook cannot read them.",
            "Save them to a file first.",
        )


def _kind(spec: RunSpec) -> str:
    return "full" if spec.method == "full" else str(spec.method.peft_type)


def _unnamed(spec: RunSpec) -> list[str]:
    """Names of changed values of the method that are no settings: facts of an adapter's file."""
    known = {setting.path for setting in settings(spec.method)}
    return [path.split(".", 1)[1] for path in changes(spec) if path not in known]


def _words(spec: RunSpec) -> str:
    return f"{_kind(spec).lower()} {spec.model.name.rstrip('/').rsplit('/', 1)[-1]}"


def _of_part(spec: RunSpec, part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {path.removeprefix(prefix): value for path, value in changes(spec).items() if path.startswith(prefix)}


def _part(spec: RunSpec, part: str, key: str, cls: str) -> str:
    changed = _of_part(spec, part)
    value = spec.to_dict()[part][key]
    changed.pop(key, None)
    return _call(cls, {key: value, **changed}) if changed else repr(value)


def _comment(setting: Setting) -> str:
    return f"  # {setting.help.split('. ')[0].split('; ')[0].rstrip('.')}" if len(setting.help) < 90 else ""


class _Code(str):
    """Shown as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _call(name: str, arguments: dict[str, Any]) -> str:
    """name(a=1, b=2), one argument a line where that is long."""
    parts = [f"{key}={_literal(value)}" for key, value in arguments.items()]
    line = f"{name}({', '.join(parts)})"
    if len(line) < 80:
        return line
    return f"{name}(\n" + "".join(f"        {part},\n" for part in parts) + "    )"


def _dict(values: dict[str, Any]) -> str:
    line = repr(values)
    if len(line) < 80:
        return line
    return "{\n" + "".join(f"        {key!r}: {_literal(value)},\n" for key, value in values.items()) + "    }"


def _literal(value: Any) -> str:
    """As a person writes it: a run of numbers as a range."""
    numbers = isinstance(value, list) and len(value) > 3 and all(isinstance(item, int) for item in value)
    if numbers and value == list(range(value[0], value[-1] + 1)):
        return f"list(range({value[0]}, {value[-1] + 1}))"
    return repr(value)


def _yaml(value: Any) -> str:
    """A value in one line of YAML, as `--set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("...\n").strip("\n")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text  # JSON is YAML too
