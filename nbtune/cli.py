"""The `nbtune` command. `nbtune --help` lists what it does; every command is a few lines over the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from nbtune.cli_evaluate import evaluate
from nbtune.cli_export import export
from nbtune.cli_runs import runs_app
from nbtune.cli_sweep import check_notebooks, sweep
from nbtune.errors import NbtuneError
from nbtune.presets import PRESETS

if TYPE_CHECKING:
    from nbtune.spec import RunSpec

app = typer.Typer(
    help="Fine-tune language models from a living notebook.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(runs_app, name="runs")
app.command()(evaluate)
app.command()(export)
app.command()(sweep)
app.command("test-notebooks")(check_notebooks)
console = Console()

RunsDir = Annotated[
    Path | None, typer.Option("--runs-dir", envvar="NBTUNE_RUNS", help="Folder of the runs; default ./runs.")
]
SpecFile = Annotated[
    Path | None, typer.Argument(metavar="[SPEC.yaml]", help="A run's settings; none begins with the defaults.")
]
Model = Annotated[str | None, typer.Option("--model", help="A packaged name, a hub id, a folder or a .gguf file.")]
Data = Annotated[str | None, typer.Option("--data", help="stdlib-docs, a file or a hub dataset.")]
Method = Annotated[str | None, typer.Option("--method", help="lora, oft, ia3, ...; full trains every weight.")]
Preset = Annotated[str | None, typer.Option("--preset", help=f"{', '.join(PRESETS)}.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change any setting: learning_rate=1e-4, data.seed=1. Repeatable."),
]


def main() -> None:
    """Run the command; a user's error is shown as title, cause and remedy, without a traceback."""
    try:
        app()
    except NbtuneError as error:
        if os.environ.get("NBTUNE_DEBUG"):
            raise
        title, *rest = str(error).splitlines() or [type(error).__name__]
        Console(stderr=True).print(f"[bold red]error:[/] {title}", *rest, sep="\n", highlight=False, markup=True)
        sys.exit(1)


@app.command()
def demo(
    runs_dir: RunsDir = None,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 20,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Open the chat when the training is done.")] = True,
) -> None:
    """Fine-tune the packaged model on Python's own documentation, and chat with what came out."""
    from nbtune._demo import run_demo

    run_demo(_folder(runs_dir), max_steps=max_steps, chat=chat, console=console)


@app.command()
def lab(
    folder: Annotated[Path, typer.Argument(help="Where to work; the wizard notebook is put there once.")] = Path(),
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the browser.")] = True,
    port: Annotated[int, typer.Option(help="Port of JupyterLab.")] = 8888,
) -> None:
    """Open JupyterLab on the wizard."""
    from nbtune.notebook import copy_packaged

    notebook = copy_packaged("wizard.ipynb", folder)
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--ServerApp.root_dir={notebook.parent.resolve()}", f"--LabApp.default_url=/lab/tree/{notebook.name}"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # a container; Jupyter asks to be told
        command.append("--allow-root")
    _serve(command)


@app.command()
def train(
    spec_file: SpecFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    preset: Preset = None,
    set_: Set = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Processes that share the work, one per GPU; num_processes.")
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Train what a spec file or the options say, with progress in the terminal. Ctrl-C stops it after its step."""
    from nbtune.run import train as start

    shared = [] if nproc is None else [f"num_processes={nproc}"]
    spec = _spec(spec_file, model, data, method, preset, [*(set_ or []), *shared])
    run = start(spec, runs_dir=_folder(runs_dir))
    console.print(f"{run.id}  {run.path}", highlight=False)
    run.watch()
    _print_summary(run.summary())


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, label, the end of its id, or its folder.")],
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Go on with so many processes; none is as many as before.")
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Go on with a run that was stopped, killed or failed, from its last checkpoint."""
    from nbtune.run import Run

    run = Run.open(run_id, runs_dir=_folder(runs_dir)).resume(num_processes=nproc)
    run.watch()
    _print_summary(run.summary())


@app.command()
def arena(
    run_ids: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs or adapter folders; the base is always there.")
    ],
    runs_dir: RunsDir = None,
    port: Annotated[int | None, typer.Option(help="Port of the page; default the first free one from 7860.")] = None,
) -> None:
    """Chat with the base model and adapters side by side."""
    from nbtune.compare.arena import arena as open_arena

    page = open_arena("base", *_columns(run_ids, runs_dir), runs_dir=_folder(runs_dir), port=port)
    console.print("Ctrl-C ends it.")
    page.wait()


@app.command()
def serve(
    run_ids: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs or adapter folders; the base is always there.")
    ],
    runs_dir: RunsDir = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint; 0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Elsewhere than on this machine a key is asked for.")
    ] = ("127.0.0.1"),
    api_key: Annotated[
        str | None, typer.Option(envvar="NBTUNE_API_KEY", help="What clients must send; made where one is needed.")
    ] = None,
) -> None:
    """Serve the base model and adapters to every client of the OpenAI API."""
    from nbtune.infer.server import serve as start

    with start("base", *_columns(run_ids, runs_dir), runs_dir=_folder(runs_dir), host=host, port=port,
               api_key=api_key) as server:  # fmt: skip
        console.print(f"{server.url}   models: {', '.join(server.engine.columns)}", highlight=False, soft_wrap=True)
        if server.api_key is not None and api_key is None:
            console.print(f"API key: {server.api_key}", highlight=False, soft_wrap=True)
        console.print("Ctrl-C ends it.")
        server.wait()


@app.command()
def ui(
    runs_dir: RunsDir = None,
    port: Annotated[int, typer.Option(help="Port of the MLflow page.")] = 5000,
) -> None:
    """Open MLflow on the runs."""
    from nbtune.spec import TrackingSpec
    from nbtune.store import initialise, tracking_uri

    folder = _folder(runs_dir)
    uri = tracking_uri(TrackingSpec(), folder)
    initialise(uri, folder)
    console.print(f"MLflow: http://127.0.0.1:{port}   (Ctrl-C ends it)")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",  # one person looks; each of MLflow's four takes as long to start as the first
        "1",
    ]
    _serve(command)


@app.command()
def sync(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, label, the end of its id, or its folder.")],
    runs_dir: RunsDir = None,
) -> None:
    """Send to MLflow what it missed of a run."""
    from nbtune.run import Run
    from nbtune.train.tracking import sync as send

    console.print(f"MLflow run {send(Run.open(run_id, runs_dir=_folder(runs_dir)).path)} is complete.")


@app.command()
def check(
    spec_file: SpecFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    preset: Preset = None,
    set_: Set = None,
    runs_dir: RunsDir = None,
) -> None:
    """Say what would go wrong with a spec, what it needs, and how long it takes, without starting it."""
    from nbtune.check import check as find_problems
    from nbtune.plan import plan

    spec = _spec(spec_file, model, data, method, preset, set_ or [])
    problems = find_problems(spec, runs_dir=_folder(runs_dir))
    for problem in problems:
        console.print(str(problem), highlight=False, markup=False)
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(1)
    console.print(f"Ready. Needs {plan(spec)}.", highlight=False)


def _columns(names: list[str], runs_dir: Path | None) -> list[Any]:
    """Adapter folders as they are; what else is named is a run."""
    from nbtune.run import Run

    return [
        name if (Path(name) / "adapter_config.json").exists() else Run.open(name, runs_dir=_folder(runs_dir))
        for name in names
    ]


def _serve(command: list[str]) -> NoReturn:
    """Run a server until it ends. Ctrl-C reaches it too, and it takes its time to shut down."""
    process = subprocess.Popen(command)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:
            continue


def _folder(runs_dir: Path | None) -> Path:
    from nbtune.models.trained import default_runs_dir

    return runs_dir or default_runs_dir()


def _spec(
    file: Path | None, model: str | None, data: str | None, method: str | None, preset: str | None, set_: list[str]
) -> RunSpec:
    """A spec file, or the defaults, with another model, data or method, then a preset, then single settings."""
    from nbtune.spec import RunSpec

    if file is None and data is None:
        remedy = "Name a spec file, or with --data a file, a hub dataset or stdlib-docs."
        raise NbtuneError("There is nothing to train on", "", remedy)
    if file is not None and not file.exists():
        raise NbtuneError(f"There is no file {file}", "", "Write one: `model:`, `data:`, `method:` and `training:`.")
    changes = dict(map(_change, set_))
    spec = RunSpec() if file is None else RunSpec.from_yaml(file)
    if "method" in changes:  # a preset depends on it
        method = changes.pop("method")
    named = {"model.name": model, "data.source": data, "method": method}
    spec = spec.updated(**{path: value for path, value in named.items() if value is not None})
    if preset is not None:
        spec = spec.preset(preset)
    return spec.updated(**changes)


def _change(text: str) -> tuple[str, Any]:
    """The name and the value of one --set."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise NbtuneError(f"--set {text} has no value", "", "Write --set name=value.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise NbtuneError(f"--set {name} cannot be read", str(error), "Put a text in quotes.") from error


def _print_summary(summary: dict[str, object]) -> None:
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if isinstance(before, float) and isinstance(after, float):
        console.print(
            f"Held-out loss {before:.3f} → {after:.3f} nats per token ({after / before - 1:+.0%})", highlight=False
        )
    console.print(f"{summary['id']}: {summary['status']}", highlight=False)


if __name__ == "__main__":
    main()
