"""The arena: a Gradio page on this machine in which the base and its adapters answer the same prompt side by side.

    page = arena("base", run)      # a Run, a run id, or an adapter's folder
    page.url                       # http://127.0.0.1:7860
    page.wait()                    # a script stays here until Ctrl-C; a notebook does not need it

Gradio is imported with this module, which takes seconds: import it when an arena is wanted.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from nbtune.compare.look import CSS, theme
from nbtune.compare.page import Page
from nbtune.errors import NbtuneError
from nbtune.infer.columns import ColumnLike, Lineup, line_up
from nbtune.infer.engine import Engine

HOST = "127.0.0.1"
_open: Arena | None = None  # one arena a process: an abandoned one would keep its port and its model


def arena(
    *columns: ColumnLike,
    runs_dir: str | Path | None = None,
    port: int | None = None,
    launch: bool = True,
    inbrowser: bool = False,
) -> Arena:
    """Open the chat that compares these columns; the base is always one of them. Closes the arena opened before.

    A column is a run, a run id under `runs_dir` (default: `NBTUNE_RUNS`, else `runs`), an adapter's folder, or
    `"base"`. port: none takes the first free one from 7860. The page is served on 127.0.0.1 only, and never shared.
    Raises NbtuneError before anything is loaded where a column does not exist.
    """
    global _open  # noqa: PLW0603 - see its comment
    lineup = line_up(columns, runs_dir)
    if _open is not None:
        _open.close()
    opened = _open = Arena(lineup)
    if launch:
        opened.launch(port=port, inbrowser=inbrowser)
    return opened


class Arena:
    """An open arena. As a context manager it closes itself."""

    def __init__(self, lineup: Lineup) -> None:
        self.columns: tuple[str, ...] = ()
        self.url: str | None = None  # none before launch and after close
        self.engine = Engine.of(lineup)
        self.columns = self.engine.columns
        self._page = Page(self.engine, lineup.labels)
        self._closed = threading.Event()

    def launch(self, port: int | None = None, inbrowser: bool = False) -> Arena:
        """Start serving. In a notebook the page also appears under the cell; the URL is printed in any case."""
        try:
            _, url, _ = self._page.blocks.launch(
                share=False,  # none would mean True on Colab and Kaggle
                server_name=HOST,
                server_port=port,
                inbrowser=inbrowser,
                inline=_in_notebook(),
                height=760,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                footer_links=[],
                run_history=False,  # Gradio would keep every conversation in the browser
                enable_monitoring=False,
                ssr_mode=False,
                theme=theme(),
                css_paths=CSS,
            )
        except OSError as error:
            self.close()
            raise NbtuneError("The port is taken", str(error), "Choose another, or none for a free one.") from error
        self.url = url.rstrip("/")
        print(f"Arena: {self.url}", flush=True)  # noqa: T201 - the iframe does not reach a hub or a reopened notebook
        return self

    def wait(self) -> None:
        """Block until the arena is closed; Ctrl-C (the notebook's interrupt) closes it."""
        try:
            # A wait without a timeout cannot be interrupted on Windows.
            while not self._closed.wait(0.5):
                pass
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """Stop serving, free the port, and give the model's memory back."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._page.close()
        self.url = None
        self.engine.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Arena({', '.join(self.columns)}: {self.url or 'closed'})"


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. IPython is not imported where nobody has imported it."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
