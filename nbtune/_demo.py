"""`nbtune demo`: the packaged notebook, executed end to end, with what came of it told in the terminal."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from nbtune._names import new_id
from nbtune.notebook import execute, packaged
from nbtune.plan import format_bytes, format_seconds
from nbtune.run import Run

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "What does `os.path.join` do in Python?",
    "What is the signature of `textwrap.fill`?",
    "What does `shutil.which` do in Python?",
)


def run_demo(runs_dir: Path, *, max_steps: int, chat: bool, console: Console) -> None:
    """Train, tell, compare, and serve the chat until Ctrl-C (unless `chat` is False)."""
    runs_dir = runs_dir.resolve()
    run_id = new_id(runs_dir)
    output = runs_dir / "notebooks" / f"{run_id}.ipynb"
    console.print(Panel.fit(f"[bold]nbtune demo[/]  {MODEL} learns Python's standard library", border_style="blue"))
    began = time.monotonic()
    _execute(output, {"max_steps": max_steps, "runs_dir": str(runs_dir), "run_id": run_id}, runs_dir / run_id, console)
    run = Run.open(runs_dir / run_id)

    from nbtune.store import tracking_uri
    from nbtune.train.tracking import log_artifact

    log_artifact(run.path, output)
    _print_summary(run, output, tracking_uri(run.spec.tracking, runs_dir), time.monotonic() - began, console)
    _print_answers(run, console)
    if chat:
        from nbtune.compare.arena import arena

        console.print("[bold]Chat[/]      Ctrl-C ends it.")
        page = arena("base", run)
        page.wait()
    else:
        console.print(f"[bold]Chat[/]      nbtune arena {run.id} --runs-dir {runs_dir}", highlight=False)


def _execute(output: Path, parameters: dict[str, object], run_path: Path, console: Console) -> None:
    """Execute the notebook in a thread and show how far its run is."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            execute(packaged("train.ipynb"), output, parameters)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting the notebook", total=None, now="")
        while thread.is_alive():
            thread.join(0.5)
            if (run_path / "spec.yaml").exists():
                _show(progress, task, Run.open(run_path))
    if failure:
        raise failure[0]


def _show(progress: Progress, task: TaskID, run: Run) -> None:
    state = run.progress()
    losses = [event["loss"] for event in run.events() if event["type"] == "train"]
    now = ""
    if losses and state.tokens_per_second:
        left = f"  {format_seconds(state.eta_seconds)} left" if state.eta_seconds is not None else ""
        speed = f"{state.tokens_per_second:.0f} tokens/s"
        now = f"step {state.step}/{state.total_steps}  loss {losses[-1]:.2f}  {speed}{left}"
    progress.update(task, description=state.message, completed=state.step, total=state.total_steps, now=now)


def _print_summary(run: Run, notebook: Path, mlflow_uri: str, seconds: float, console: Console) -> None:
    summary = run.summary()
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    peak, planned = (format_bytes(summary[f"{key}_peak_bytes"]) for key in ("measured", "planned"))
    lines = {
        "Held out": f"loss {before:.2f} → {after:.2f} nats per token ([bold]{after / before - 1:+.0%}[/]) "
        f"in {summary['steps']} steps, {format_seconds(seconds)}",
        "Speed": f"{summary['train_tokens_per_second']:.0f} tokens/s, peak memory {peak} (planned {planned})",
        "Run": str(run.path),
        "Notebook": str(notebook),
        "MLflow": f"{mlflow_uri}   (nbtune ui --runs-dir {run.path.parent})",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<9}[/] {text}", highlight=False, soft_wrap=True)


def _print_answers(run: Run, console: Console) -> None:
    """The same questions to the base and to the adapter, greedily."""
    from nbtune.infer.ask import ask

    with console.status("asking both models"):
        answers = ask(QUESTIONS, "base", run, max_new_tokens=60)
    table = Table(show_lines=True, header_style="bold", width=min(console.width, 140))
    for name in ("question", "base", "after training"):
        table.add_column(name, ratio=1 if name == "question" else 2)
    for answer in answers:
        table.add_row(*(escape(text) for text in answer.values()))
    console.print(table, highlight=False)
