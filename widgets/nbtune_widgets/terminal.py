"""The view of a run in a plain terminal: one line that moves, the reason of a failure, and the summary at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nbtune_widgets import _summary
from nbtune_widgets.live import LiveRun, alive, done, progress_line


class TerminalView:
    """As `LiveView`, without widgets: `pump()` blocks until the run ends. Ctrl-C stops the run, a second one leaves."""

    def __init__(self, run: LiveRun, interval: float = 0.5, console: Console | None = None) -> None:
        self.run = run
        self.interval = interval
        self.console = console or Console()

    def pump(self) -> None:
        columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}")]
        stopping = False
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(self.run.id, total=1.0, line="")
            while True:
                try:
                    running = alive(self.run)
                    bar.update(task, **self._look())
                    if not running:
                        break
                    time.sleep(self.interval)
                except KeyboardInterrupt:
                    if stopping:
                        raise
                    stopping = True
                    self.run.stop()
        self._conclude()

    def _look(self) -> dict[str, Any]:
        progress, losses = self.run.progress(), _losses(self.run)
        paused = "paused" if self.run.status == "paused" else ""
        return {
            "completed": done(progress),
            "line": " · ".join(part for part in (paused, progress_line(progress), losses) if part),
        }

    def _conclude(self) -> None:
        table = Table.grid(padding=(0, 2))
        for what, text in _summary.rows(self.run):
            table.add_row(f"[bold]{what}", text, style="red" if what == "Failed with" else "")
        self.console.print(table)


def _losses(run: LiveRun) -> str:
    events = run.events()
    train = [event["loss"] for event in events if event["type"] == "train" and event.get("loss") is not None]
    held_out = [event["eval_loss"] for event in events if event["type"] == "eval"]
    parts = [f"loss {train[-1]:.2f}"] if train else []
    return " · ".join(parts + ([f"held out {held_out[-1]:.2f}"] if held_out else []))
