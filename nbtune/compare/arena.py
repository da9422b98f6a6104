"""The arena: a Gradio page on this machine in which the base and its adapters answer the same prompt side by side.

    page = arena("base", run)      # a Run, a run id, or an adapter's folder
    page.url                       # http://127.0.0.1:7860
    page.wait()                    # a script stays here until Ctrl-C; a notebook does not need it

Gradio is imported with this module, which takes seconds: import it when an arena is wanted.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from nbtune.compare.ballot import Ballot
from nbtune.compare.extra import Extra
from nbtune.compare.look import CSS, theme
from nbtune.compare.mixer import Mixer
from nbtune.compare.page import Page
from nbtune.compare.routed import Routed
from nbtune.compare.routing import by_likeness
from nbtune.errors import NbtuneError
from nbtune.infer.attachments import MAX_BYTES
from nbtune.infer.columns import BASE, ColumnLike, Lineup, line_up
from nbtune.infer.engine import Engine
from nbtune.infer.router import Router
from nbtune.infer.similarity import Embedder
from nbtune.models.trained import default_runs_dir
from nbtune.spec import DataSpec, RunSpec

HOST = "127.0.0.1"
USER = "nbtune"  # of a page with a password
_open: Arena | None = None  # one arena a process: an abandoned one would keep its port and its model


def arena(
    *columns: ColumnLike,
    runs_dir: str | Path | None = None,
    router: Router | None = None,
    port: int | None = None,
    launch: bool = True,
    inbrowser: bool = False,
    share: bool = False,
    password: str | None = None,
) -> Arena:
    """Open the chat that compares these columns; the base is always one of them. Closes the arena opened before.

    Args:
        columns: Runs, run ids under `runs_dir`, adapters' folders, models (ModelSpec), `"base"`.
        runs_dir: The folder of runs, where votes and mixes are kept too. None is `NBTUNE_RUNS`, else `runs`.
        router: Of the router's column, from `nbtune.router`. None chooses by likeness to each run's training data.
        port: None takes the first free one from 7860.
        launch: Whether to serve the page at once.
        inbrowser: Whether to open a browser on it.
        share: Whether Gradio's servers make the page reachable from everywhere, for three days at most.
        password: Of the user `nbtune`, without which nobody sees the page; a shared page must have one.

    The page is served on 127.0.0.1 only, unless shared. Raises NbtuneError before anything is loaded where a column
    does not exist, the router would choose one that is not there, or a shared page would have no password.
    """
    global _open  # noqa: PLW0603 - see its comment
    if share and not password:
        raise NbtuneError(
            "A shared page needs a password",
            "Whoever finds its address could use your machine.",
            "Give one: arena(..., share=True, password=...).",
        )
    lineup = line_up(columns, runs_dir)
    if _open is not None:
        _open.close()
    opened = _open = Arena(lineup, Path(runs_dir or default_runs_dir()), router)
    if launch:
        opened.launch(port=port, inbrowser=inbrowser, share=share, password=password)
    return opened


class Arena:
    """An open arena. As a context manager it closes itself."""

    def __init__(self, lineup: Lineup, runs_dir: Path, router: Router | None = None) -> None:
        self.columns: tuple[str, ...] = ()
        self.url: str | None = None  # none before launch and after close
        if router is not None:
            _check(router, lineup)
        self.engine = Engine.of(lineup, on_status=_warn)
        self.columns = self.engine.columns
        self._ballot = Ballot(runs_dir, lineup.model.name, self.columns, on_warning=_warn)
        extras = _extras(self.engine, lineup, runs_dir, router)
        self._page = Page(self.engine, lineup.labels, self._ballot, extras, _data(lineup))
        self._closed = threading.Event()

    def launch(
        self, port: int | None = None, inbrowser: bool = False, *, share: bool = False, password: str | None = None
    ) -> Arena:
        """Start serving, as `arena` says. In a notebook the page also appears under the cell; the URL is printed."""
        try:
            _, url, public = self._page.blocks.launch(
                share=share,  # none would mean True on Colab and Kaggle
                auth=(USER, password) if password else None,
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
                max_file_size=MAX_BYTES,
            )
        except OSError as error:
            self.close()
            raise NbtuneError("The port is taken", str(error), "Choose another, or none for a free one.") from error
        self.url = url.rstrip("/")
        if share and public is None:
            self.close()
            raise NbtuneError(
                "The page cannot be shared", "Gradio's servers did not answer.", "Go online, or leave out share."
            )
        print(f"Arena: {public or self.url}", flush=True)  # noqa: T201 - the iframe does not reach a hub or a reopened notebook
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
        self._ballot.close()
        self.engine.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Arena({', '.join(self.columns)}: {self.url or 'closed'})"


def _extras(engine: Engine, lineup: Lineup, runs_dir: Path, router: Router | None) -> list[Callable[[], Extra]]:
    """The panels of columns that can be shown beside those of the engine."""
    own = [column for column in lineup.columns if column.name in lineup.adapters]

    def by_data() -> Router:
        embedder = Embedder(engine.hidden_states, engine.tokenizer, engine.base_of(BASE).source.origin)
        return by_likeness(own, embedder, {})

    extras: list[Callable[[], Extra]] = []
    if own:
        extras.append(lambda: Mixer(engine, runs_dir / "mixes"))
    if own or router:
        extras.append(lambda: Routed(lambda: router or by_data()))
    return extras


def _data(lineup: Lineup) -> dict[str, DataSpec]:
    """What each run was trained on, by its name and the data's."""
    found: dict[str, DataSpec] = {}
    for column in lineup.columns:
        spec = column.folder.parent / "spec.yaml"
        if spec.is_file():
            data = RunSpec.from_yaml(spec).data
            found[f"{Path(data.source).name} ({column.name})"] = data
    return found


def _check(router: Router, lineup: Lineup) -> None:
    if unknown := [name for name in router.columns if name not in lineup.labels]:
        raise NbtuneError(
            "The router knows columns that are not compared",
            f"{', '.join(unknown)} is not among {', '.join(lineup.labels)}.",
            "Name the same runs in both.",
        )


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - there is a page, but nobody has it open for sure


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. IPython is not imported where nobody has imported it."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
