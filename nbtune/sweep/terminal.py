"""A sweep in a plain terminal: a line a trial, moving while they run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from nbtune.plan import format_seconds
from nbtune.sweep.preview import show
from nbtune.sweep.trial import State, Trial

if TYPE_CHECKING:
    from nbtune.sweep.sweep import Sweep

STYLES: dict[State, str] = {
    "finished": "green", "running": "bold", "failed": "red", "died": "red", "timed out": "red",
    "waiting": "dim", "refused": "dim", "stopped": "yellow", "stopped early": "yellow",
}  # fmt: skip
INTERVAL = 0.5  # seconds between two looks


def watch(sweep: Sweep, console: Console | None = None) -> None:
    """Show the trials until the sweep ends. Ctrl-C interrupts it, a second one leaves."""
    console = console or Console()
    interrupted = False
    with Live(_shown(sweep), console=console, auto_refresh=False, transient=True) as live:
        while sweep.status == "running":
            try:
                live.update(_shown(sweep), refresh=True)
                time.sleep(INTERVAL)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                sweep.interrupt()
    console.print(_shown(sweep))


def table(sweep: Sweep) -> Table:
    """The trials as they stand, the best one marked."""
    trials, best, metric = sweep.trials, sweep.best, sweep.design.metric
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    made = Table("", "trial", *map(escape, names), "state", metric, "time", "", box=None, header_style="bold")
    for trial in trials:
        value = trial.metrics.get(metric)
        made.add_row(
            "★" if best is not None and trial.number == best.number else "",
            str(trial.number),
            *(escape(show(trial.params[name])) if name in trial.params else "" for name in names),
            trial.state,
            show(value) if value is not None else "",
            format_seconds(trial.seconds) if trial.seconds is not None else "",
            escape(_told(trial)),
            style=STYLES[trial.state],
        )
    return made


def _shown(sweep: Sweep) -> Group:
    warnings = [f"warning: {event['message']}" for event in sweep.events() if event["type"] == "warning"]
    return Group(table(sweep), *warnings, f"{sweep.id}: {sweep.sentence()}")


def _told(trial: Trial) -> str:
    """How far a trial is, or why it ended."""
    if trial.error:
        return next((line for line in trial.error.splitlines()[1:] if line), trial.error.splitlines()[0])
    if trial.state != "running":
        return ""
    run = trial.run
    if run is None:
        return "starting"
    progress = run.progress()
    return f"{progress.step}/{progress.total_steps} steps" if progress.step else progress.message
