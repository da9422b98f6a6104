"""What a notebook shows of nbtune: the live view of a run and the wizard. `nbtune` reaches in here lazily."""

from __future__ import annotations

from nbtune_widgets.live import LiveRun, LiveView
from nbtune_widgets.runs import RunsView, show_runs
from nbtune_widgets.wizard import Wizard, wizard

__all__ = ["LiveView", "RunsView", "Wizard", "in_kernel", "show", "show_runs", "watch", "watch_async", "wizard"]


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
