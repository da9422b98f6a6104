"""`nbtune sweep` and `nbtune test-notebooks`: notebooks executed many times, or many notebooks once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from nbtune.errors import SweepError

if TYPE_CHECKING:
    from nbtune.sweep.halving import Halving

console = Console()


def sweep(
    notebook: Annotated[Path, typer.Argument(metavar="NOTEBOOK", help="One with a cell tagged 'parameters'.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="What is varied: r=4,8 or learning_rate=1e-5..1e-3:log:4. Repeatable."),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", help="The same in all trials: max_steps=100. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; default one in sweeps/.")] = None,
    sampler: Annotated[str, typer.Option(help="grid, random, tpe, gp.")] = "grid",
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trials.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Each point so often, with other seeds.")] = 1,
    seed: Annotated[int, typer.Option(help="Of random points, and the first of repeats.")] = 0,
    metric: Annotated[str, typer.Option(help="By which trials are compared.")] = "eval_loss_after",
    maximise: Annotated[bool, typer.Option("--maximise", help="More of the metric is better.")] = False,
    hours: Annotated[float | None, typer.Option(help="After which no trial starts.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a trial is killed.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="On Ray: auto, an address, or local for one that ends with the sweep.")
    ] = None,
    halving: Annotated[
        str | None, typer.Option(metavar="STEPS[,FACTOR]", help="Stop trials that fall behind after so many steps.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Also do again what failed, died or timed out.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="Train trials that share a base model in one process, on one base.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Only say what would run, and what it takes.")] = (False),
    commands: Annotated[
        bool, typer.Option("--commands", help="Only print a command for each trial, for another engine to run.")
    ] = False,
) -> None:
    """Execute a notebook once per trial. The same command goes on with a sweep that was interrupted."""
    from nbtune.sweep.space import read_values
    from nbtune.sweep.sweep import sweep as make

    made = make(
        notebook,
        dict(map(read_values, set_ or [])),
        params=dict(map(_value, param or [])),
        sampler=sampler,
        trials=trials,
        repeats=repeats,
        seed=seed,
        metric=metric,
        maximise=maximise,
        hours=hours,
        timeout=timeout,
        jobs=jobs,
        ray=ray,
        halving=_halving(halving),
        retry=retry,
        together=together,
        out=out,
        start=False,
    )
    if commands:
        for command in made.commands():
            typer.echo(command)
        return
    console.print(made.preview.table())
    console.print(made.preview.sentence(), highlight=False)
    if together:
        console.print(made.grouping(), highlight=False)
    if preview:
        return
    console.print(str(made.path), highlight=False, soft_wrap=True)
    made.start().watch(console)
    if made.best is not None:
        console.print(f"Best: trial {made.best.number}, {made.path / 'best'}", highlight=False, soft_wrap=True)
    if made.status != "finished":
        console.print("The same command goes on with it.")
        raise typer.Exit(1)


def check_notebooks(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR_OR_NOTEBOOK...", help="Executed in this order.")],
    param: Annotated[
        list[str] | None, typer.Option("--param", help="For each notebook that knows it; max_steps=2 if not given.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one notebook.")] = 600,
    out: Annotated[Path | None, typer.Option(help="Keep the executed notebooks and their runs here.")] = None,
) -> None:
    """Execute notebooks with few steps, and report like pytest: a line each, and exit status 1 if one failed."""
    from nbtune.sweep.notebooks import find_notebooks, run_notebooks

    values = {"max_steps": 2, **dict(map(_value, param or []))}
    found = find_notebooks(paths)
    if out is not None and out.exists() and any(out.iterdir()):
        raise SweepError(f"{out} is not empty", "", "Name a new folder.")
    with nullcontext(out) if out is not None else TemporaryDirectory(prefix="nbtune-") as folder:
        failures, seconds = [], 0.0
        for number, result in enumerate(run_notebooks(found, values, Path(folder), timeout=timeout), 1):
            seconds += result.seconds
            verdict = "[green]PASSED[/]" if result.outcome == "finished" else "[red]FAILED[/]"
            share = f"\\[{100 * number // len(found):3d}%]"
            console.print(f"{escape(str(result.path))} {verdict} {share} {result.seconds:.1f}s", soft_wrap=True)
            failures += [result] if result.outcome != "finished" else []
    for failure in failures:
        console.rule(f"{failure.path} {failure.outcome}", style="red")
        console.print(failure.error, markup=False, soft_wrap=True)
    passed = len(found) - len(failures)
    counts = [f"{len(failures)} failed"] * bool(failures) + [f"{passed} passed"] * bool(passed)
    console.rule(f"{', '.join(counts)} in {seconds:.1f}s", style="red" if failures else "green")
    if failures:
        raise typer.Exit(1)


def _value(text: str) -> tuple[str, Any]:
    """The name and the value of one --param."""
    from nbtune.sweep.space import read_value

    name, equals, value = text.partition("=")
    if not equals:
        raise SweepError(f"--param {text} has no value", "", "Write --param name=value.")
    return name, read_value(value)


def _halving(text: str | None) -> Halving | None:
    from nbtune.sweep.halving import Halving

    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) > 2 or not all(number.strip().isdecimal() for number in numbers):
        raise SweepError(f"--halving {text} cannot be read", "", "Write --halving 20 or --halving 20,3.")
    return Halving(*map(int, numbers))
