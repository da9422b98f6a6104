"""What a notebook shows of nbtune: the live view of a run and the wizard. `nbtune` reaches in here lazily."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nbtune_widgets.leaderboard import Leaderboard
from nbtune_widgets.live import LiveRun, LiveView
from nbtune_widgets.runs import RunsView, show_runs
from nbtune_widgets.wizard import Wizard, wizard

if TYPE_CHECKING:
    from nbtune.sweep.sweep import Sweep

__all__ = [
    "Leaderboard",
    "LiveView",
    "RunsView",
    "Wizard",
    "in_kernel",
    "show",
    "show_runs",
    "show_sweep",
    "watch",
    "watch_async",
    "watch_sweep",
    "watch_sweep_async",
    "wizard",
]

_boards: dict[Path, Leaderboard] = {}  # of sweeps on the screen: a cell that is run again leaves no widgets behind


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel, where widgets can be seen or saved."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        return False
    from ipykernel.zmqshell import ZMQInteractiveShell

    return isinstance(shell, ZMQInteractiveShell)


def watch(run: LiveRun) -> None:
    """Show the run and block until it ends: charts in a notebook, a line in a terminal."""
    if not in_kernel():
        from nbtune_widgets.terminal import TerminalView  # rich takes half a second

        TerminalView(run).pump()
        return
    view = LiveView(run, after=True)
    view.show()
    view.pump()


async def watch_async(run: LiveRun) -> None:
    """As `watch`, but awaited, so that the buttons work while the cell runs (ipykernel 7.4 and later)."""
    view = LiveView(run, after=True)
    view.show()
    await view.pump_async()


def show(run: LiveRun) -> LiveView:
    """Show the run in this cell and return at once; the Stop button works and other cells run."""
    view = LiveView(run, after=True)
    view.show()
    return view.start()


def watch_sweep(sweep: Sweep) -> None:
    """Show the leaderboard in this cell and block until the sweep ends."""
    _board(sweep).pump()


async def watch_sweep_async(sweep: Sweep) -> None:
    """As `watch_sweep`, but awaited, so that the buttons work while the cell runs."""
    await _board(sweep).pump_async()


def show_sweep(sweep: Sweep) -> None:
    """Show the leaderboard in this cell and return at once; in a terminal print a line."""
    if in_kernel():
        _board(sweep).start()
    else:
        print(repr(sweep))  # noqa: T201 - what a terminal shows of any object


def _board(sweep: Sweep) -> Leaderboard:
    """A new leaderboard, displayed; the one of this sweep that was shown before is closed."""
    former = _boards.pop(sweep.path, None)
    board = _boards[sweep.path] = Leaderboard(sweep)
    board.show()
    if former is not None:
        former.close()
    return board
