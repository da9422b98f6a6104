"""`nbtune evaluate`: a data set through the base and its adapters, with measures of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:
    from nbtune.compare.promptset import Progress
    from nbtune.compare.results import Results

console = Console()


def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="stdlib-docs, a file, a folder or a hub dataset.")],
    run_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs or adapter folders; the base is always there.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many rows; default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Also rows that a run was trained on; default only those held out.")
    ] = False,
    column_by_column: Annotated[
        bool, typer.Option("--column-by-column", help="One column's answers after another's: each has its own speed.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A .csv, .jsonl, .json or .md file to make; nothing is overwritten.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option("--runs-dir", envvar="NBTUNE_RUNS", help="Folder of the runs; default ./runs.")
    ] = None,
) -> None:
    """Let the base and adapters answer a data set, and measure the answers. Ctrl-C ends it with what is done."""
    from nbtune.compare.promptset import evaluate as run_through
    from nbtune.compare.results import check_target
    from nbtune.run import Run, default_runs_dir

    if out is not None:
        check_target(out)
    folder = runs_dir or default_runs_dir()
    columns = [
        name if (Path(name) / "adapter_config.json").exists() else Run.open(name, runs_dir=folder)
        for name in run_ids or ()
    ]
    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"), console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("Reading", total=None, left="")

        def show(progress: Progress) -> None:
            seconds = progress.eta_seconds
            left = "" if seconds is None else f"{seconds:,.0f} s left"
            bar.update(task, description="Answers", completed=progress.done, total=progress.total, left=left)

        results = run_through(
            data,
            *columns,
            limit=limit,
            max_new_tokens=max_new_tokens,
            all_rows=all_rows,
            column_by_column=column_by_column,
            runs_dir=folder,
            on_progress=show,
        )
    _print(results)
    if out is not None:
        console.print(f"Written: {results.write(out)}", highlight=False, markup=False, soft_wrap=True)


def _print(results: Results) -> None:
    """A line for each measure, a column for each column: any number of measures fits a terminal."""
    summary = results.summary()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in summary:
        table.add_column(str(column["column"]), overflow="fold")
    for name in list(summary[0])[1:]:
        table.add_row(name, *(str(column[name]) for column in summary))
    console.print(table, markup=False)
    for note in results.footnotes:
        console.print(note, style="dim", highlight=False, markup=False)
