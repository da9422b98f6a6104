"""What can be done with a run that has ended: chat with it, export it, or start a variation of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from nbtune.errors import NbtuneError
from nbtune.spec import RunSpec
from nbtune_widgets import _reports
from nbtune_widgets._style import notice
from nbtune_widgets._worker import Worker

if TYPE_CHECKING:
    from nbtune_widgets.export import ExportForm
    from nbtune_widgets.live import LiveRun


class After:
    """Buttons, and under them what they open. The buttons are its driver's, what is opened is the worker's."""

    def __init__(self, run: LiveRun, vary: Callable[[RunSpec], None] | None = None) -> None:
        self.run = run
        self._show_form = vary or self._open_form
        self._worker: Worker | None = None
        self._wizard: Any = None
        self._exporting: ExportForm | None = None
        self.compare_button = self._button("Compare", "Chat with the base model and this run, side by side")
        self.vary_button = self._button("Start a variation", "Open the form with the settings of this run")
        self.export_button = self._button("Export", "Write the trained model for other programs, and prove it")
        self.compare_button.add_class("nt-primary")
        self.compare_button.on_click(lambda _: self._ask("Loading the model …", self._compare))
        self.vary_button.on_click(lambda _: self._ask("Opening the form …", self._vary))
        self.export_button.on_click(lambda _: self._ask("Opening the form …", self._export))
        self.told = widgets.HTML()
        self.opened = widgets.VBox()
        self.buttons = widgets.HBox(
            [self.compare_button, self.export_button, self.vary_button, self.told],
            layout=widgets.Layout(display="none", align_items="center", flex_flow="row wrap"),
        )
        self.widget = widgets.VBox([self.buttons, self.opened])

    def offer(self, ended: bool) -> None:
        """Show the buttons of an ended run."""
        self.buttons.layout.display = None if ended else "none"

    def close(self) -> None:
        """End the worker, and the form that was opened."""
        if self._worker is not None:
            self._worker.close()
        self._close_opened()

    def _close_opened(self) -> None:
        for opened in (self._wizard, self._exporting):
            if opened is not None:
                opened.close()
        self._wizard = self._exporting = None

    def _button(self, text: str, tooltip: str) -> widgets.Button:
        return widgets.Button(description=text, tooltip=tooltip)

    def _ask(self, status: str, work: Any) -> None:
        if self._worker is None:
            self._worker = Worker(f"nbtune-after-{self.run.id}", self._say, self._failed)
        self._worker.ask("after", status, work)

    def _say(self, text: str) -> None:
        if text:
            self.told.value = f'<span class="nt-soft" role="status" style="margin:0 8px">{escape(text)}</span>'

    def _failed(self, _: str, error: Exception) -> None:
        text = str(error) if isinstance(error, NbtuneError) else f"{type(error).__name__}\n{error}"
        where = "".join(traceback.format_exception(error))
        self.told.value = notice(text, "error") + _reports.folded("Traceback", where)

    def _compare(self) -> None:
        from nbtune.compare.arena import arena

        url = arena("base", self.run).url  # pyright: ignore[reportArgumentType] - a Run, or what a test has for one
        link = f'<a href="{url}" target="_blank" rel="noopener">{url}</a>'
        both = f"The base model and {escape(self.run.name)} answer, side by side, at {link}"
        self.told.value = f'<div class="nt-problem nt-info">{both}</div>'

    def _export(self) -> None:
        from nbtune_widgets.export import ExportForm

        self._close_opened()
        self._exporting = ExportForm(self.run)
        self.opened.children = (self._exporting.widget,)
        self.told.value = ""

    def _vary(self) -> None:
        self._show_form(self.run.spec)
        self.told.value = ""

    def _open_form(self, spec: RunSpec) -> None:
        from nbtune_widgets.wizard import Wizard

        self._close_opened()
        self._wizard = Wizard(
            model=spec.model, data=spec.data, method=spec.method, training=spec.training, tracking=spec.tracking
        )
        self.opened.children = (self._wizard.widget,)
