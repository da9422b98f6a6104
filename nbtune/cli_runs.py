"""`nbtune runs`: list the runs; name, compare, pause, stop, delete and restore them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from nbtune.errors import NbtuneError

if TYPE_CHECKING:
    from nbtune.run import Run

runs_app = typer.Typer()
console = Console()

RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, label, the end of its id, or its folder.")]
RunIds = Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids or labels of runs, or their folders.")]
RunsDir = Annotated[
    Path | None, typer.Option("--runs-dir", envvar="NBTUNE_RUNS", help="Folder of the runs; default ./runs.")
]
Sort = Literal["age", "loss", "speed", "memory", "name"]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    runs_dir: RunsDir = None,
    sort: Annotated[Sort, typer.Option(help="What the runs are sorted by.")] = "age",
) -> None:
    """List the runs, newest first; or name, compare, stop and delete them."""
    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {"runs_dir": runs_dir}}
        return
    from nbtune.run import runs as known

    found = [(run, run.summary()) for run in known(_folder(runs_dir))]
    rows = [_row(run, summary) for run, summary in sorted(found, key=lambda pair: _sort_key(sort, *pair))]
    if rows:
        _print(_fitting(rows))
    else:
        console.print(f"No runs in {_folder(runs_dir)}. `nbtune demo` or `nbtune train SPEC.yaml` makes one.")


@runs_app.command()
def rename(
    run_id: RunId,
    label: Annotated[str, typer.Argument(help='What to call it; "" takes the label away.')],
    runs_dir: RunsDir = None,
) -> None:
    """Give a run a label. Its folder keeps its name."""
    _open(run_id, runs_dir).rename(label)


@runs_app.command()
def note(
    run_id: RunId,
    text: Annotated[str | None, typer.Argument(help="What to write down; without it, what was is shown.")] = None,
    runs_dir: RunsDir = None,
) -> None:
    """Write down what there is to say of a run, or read it."""
    run = _open(run_id, runs_dir)
    if text is None:
        console.print(run.about.note or "No note.", highlight=False, markup=False)
    else:
        run.annotate(text)


@runs_app.command()
def diff(run_ids: RunIds, runs_dir: RunsDir = None) -> None:
    """Show the settings in which runs differ."""
    from nbtune.shelf import difference

    chosen = [_open(run_id, runs_dir) for run_id in run_ids]
    table = Table("setting", *(escape(run.name) for run in chosen), box=None, header_style="bold")
    for path, values in difference(chosen).items():
        table.add_row(path, *("–" if value is None else escape(str(value)) for value in values))
    if table.row_count:
        _print(table)
    else:
        console.print("Their settings are the same.")


@runs_app.command()
def pause(run_id: RunId, runs_dir: RunsDir = None) -> None:
    """Have a run wait after its step, in whatever process it trains; `nbtune resume` goes on."""
    _open(run_id, runs_dir).pause()


@runs_app.command()
def stop(run_id: RunId, runs_dir: RunsDir = None) -> None:
    """End a run after its step, in whatever process it trains; `nbtune resume` goes on."""
    _open(run_id, runs_dir).stop()


@runs_app.command()
def delete(run_ids: RunIds, runs_dir: RunsDir = None, yes: Yes = False) -> None:
    """Move runs to the trash, from where `nbtune runs restore` brings them back."""
    chosen = [_open(run_id, runs_dir) for run_id in run_ids]
    if not yes:
        typer.confirm(f"Delete {', '.join(run.id for run in chosen)}?", abort=True)
    for run in chosen:
        console.print(f"{run.id} is in {run.delete()}", highlight=False, soft_wrap=True)


@runs_app.command()
def restore(run_id: RunId, runs_dir: RunsDir = None) -> None:
    """Bring a run back from the trash."""
    from nbtune.shelf import in_trash
    from nbtune.shelf import restore as bring_back

    thrown = in_trash(_folder(runs_dir))
    matches = [path for path in thrown if path.name.endswith(run_id)]
    if len(matches) != 1:
        known = ", ".join(path.name for path in thrown) or "nothing"
        raise NbtuneError(
            f"There is {'more than' if matches else 'not'} one {run_id!r} in the trash", f"It has {known}."
        )
    console.print(f"{bring_back(matches[0])} is back.", highlight=False, soft_wrap=True)


@runs_app.command()
def empty_trash(runs_dir: RunsDir = None, yes: Yes = False) -> None:
    """Delete for good what is in the trash."""
    from nbtune.shelf import empty_trash as empty
    from nbtune.shelf import in_trash

    names = [path.name for path in in_trash(_folder(runs_dir))]
    if names and not yes:
        typer.confirm(f"Delete {', '.join(names)} for good?", abort=True)
    console.print(f"{empty(_folder(runs_dir))} runs deleted for good.")


def _folder(runs_dir: Path | None) -> Path:
    from nbtune.models.trained import default_runs_dir

    return runs_dir or default_runs_dir()


def _open(run_id: str, runs_dir: Path | None) -> Run:
    from nbtune.run import Run

    return Run.open(run_id, runs_dir=_folder(runs_dir))


def _row(run: Run, summary: dict[str, Any]) -> dict[str, str]:
    from nbtune.plan import format_bytes

    before, after, peak = (summary[key] for key in ("eval_loss_before", "eval_loss_after", "measured_peak_bytes"))
    speed, label = summary["train_tokens_per_second"], run.about.label
    return {
        "run": f"{run.id} [bold]{escape(label)}[/]" if label else run.id,
        "loss": _spark([event["loss"] for event in run.events() if event["type"] == "train"]),
        "status": run.status,
        "method": summary["method"],
        "model": escape(summary["model"]),
        "data": escape(summary["data"]),
        "steps": f"{summary['steps']}/{summary['total_steps'] or '?'}",
        "held out": f"{before:.3f} → {after:.3f}" if before is not None else "",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "peak": format_bytes(peak) if peak else "",
    }


def _fitting(rows: list[dict[str, str]]) -> Table:
    """The rows, without the columns that a terminal has no room for; the more telling ones stay."""
    columns = list(rows[0])
    for least in (None, "data", "peak", "tokens/s", "model", "method", "loss"):
        columns = [column for column in columns if column != least]
        table = Table(box=None, header_style="bold")
        for column in columns:
            table.add_column(
                column, justify="right" if column in ("steps", "tokens/s", "peak") else "left", no_wrap=True
            )
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        if not console.is_terminal or _width(table) <= console.width:
            break
    return table


def _print(table: Table) -> None:
    """In a terminal as wide as that; in a file or a pipe as wide as it is, for there nothing folds it back."""
    (console if console.is_terminal else Console(width=_width(table))).print(table)


def _width(table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _sort_key(sort: Sort, run: Run, summary: dict[str, Any]) -> tuple[bool, Any]:
    """Best first; runs without such a number last."""
    if sort == "age":
        return False, -(summary["started"] or 0.0)
    if sort == "name":
        return False, run.name.lower()
    losses = (summary["eval_loss_after"], summary["train_loss"])
    speed = summary["train_tokens_per_second"]
    value = {
        "loss": next((loss for loss in losses if loss is not None), None),
        "speed": None if speed is None else -speed,
        "memory": summary["measured_peak_bytes"],
    }[sort]
    return value is None, value


def _spark(losses: list[float | None], width: int = 12) -> str:
    """The curve of the losses in `width` characters."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return ""
    count = min(width, len(known))
    bins = [known[index * len(known) // count : (index + 1) * len(known) // count] for index in range(count)]
    means = [sum(part) / len(part) for part in bins]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / ((high - low) or 1.0))] for mean in means)
