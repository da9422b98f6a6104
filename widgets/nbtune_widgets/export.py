"""A form that exports a run: format, precision, name, perhaps a hub; then the proof, in words and figures.

    form = ExportForm(run)
    form.widget              # the box to place

A callback asks the form's worker and nothing else; the worker exports, and writes all that is seen.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ipywidgets as widgets

from nbtune.errors import ExportError, NbtuneError
from nbtune.peft import LoraConfig
from nbtune.peft.config import PromptLearningConfig
from nbtune_widgets import _proof, _reports
from nbtune_widgets._board import show_if
from nbtune_widgets._cards import size
from nbtune_widgets._frame import set_class
from nbtune_widgets._style import chip, notice, style
from nbtune_widgets._worker import Worker
from nbtune_widgets.live import LiveRun, dispose

if TYPE_CHECKING:
    from nbtune.export import Export
    from nbtune.export.exporter import Format
    from nbtune.spec import RunSpec

_USES = {
    "adapter": "A few MB beside the base model, for PEFT and vLLM",
    "merged": "A folder for transformers and vLLM",
    "gguf": "One file that llama.cpp, Ollama and LM Studio read",
    "gguf-lora": "For llama.cpp, beside a GGUF of the base model",
}
_WORDS = {"q8_0": "8 bits", "q4_1": "4 bits, larger", "q4_0": "4 bits"}
_WRAP = {"align_items": "center", "flex_flow": "row wrap"}
CSS = """
.nbtune .nt-export .nt-formats{gap:8px;margin:6px 0 4px;padding:2px}
.nbtune .nt-export .nt-formats button.jupyter-button.nt-method{width:auto;flex:1 1 150px;margin:0}
.nbtune .nt-export .nt-formats button.jupyter-button.nt-method:disabled{opacity:.55}
.nbtune .nt-export .nt-go{margin-top:6px}
.nbtune .nt-export .nt-asked .widget-label{width:76px;text-align:left}
.nbtune .nt-export .nt-asked{gap:2px 8px;min-height:32px}
"""


class ExportForm:
    """Exports one run into the folder that the notebook is in. `widget` is the box to place.

    Args:
        run: A run that has ended.
    """

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self.error: str | None = None  # the traceback of the last thing that went wrong
        self.done: Export | None = None  # the last export
        self._folder = Path.cwd()
        self._format = ""
        self._dtype: str | None = None
        self._suggested = ""
        self._parameters: int | None = None
        self._busy = False
        self._asked = 0  # so far: each asking has a key of its own
        self._build()
        self._worker = Worker(f"nbtune-export-{run.id}", self._say, self._failed)
        self.choose("merged" if run.spec.method == "full" else "adapter")
        self._ask("Reading the model's config …", self._count)

    @property
    def format(self) -> Format:
        """What is chosen."""
        return cast("Format", self._format)

    @property
    def dtype(self) -> str | None:
        """The precision that is chosen; None where the format has none."""
        return self._dtype

    def choose(self, format: str, dtype: str | None = None) -> None:
        """As clicks on a format and on one of its precisions."""
        self._ask("", lambda: self._choose(format, dtype))

    def export(self) -> None:
        """As a click on Export."""
        if not self._busy:
            self._busy = True
            self._ask("Checking …", self._export)

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything asked is done. Raises TimeoutError."""
        self._worker.wait(timeout)

    def close(self) -> None:
        """Give the widgets back. An export that is under way is finished."""
        self._worker.close()
        dispose(self.widget)

    def _ask(self, status: str, act: Callable[[], object]) -> None:
        self._asked += 1
        self._worker.ask(str(self._asked), status, act)

    def _build(self) -> None:
        from nbtune.export import FORMATS

        unfit = _unfit(self.run.spec)
        self.formats = {name: self._format_button(name, unfit.get(name, "")) for name in FORMATS}
        names = dict.fromkeys(name for names in FORMATS.values() for name in names)
        self.precisions = {name: self._precision_button(name) for name in names}
        wide, narrow = widgets.Layout(width="min(420px,90%)"), {"description_width": "76px"}
        self.name = widgets.Text(description="Name", continuous_update=False, layout=wide, style=narrow)
        self.place = widgets.HTML()
        self.hub = widgets.Checkbox(description="Push to a hub", indent=False, layout=widgets.Layout(width="auto"))
        self.repository = widgets.Text(
            description="Repository", placeholder="owner/name", continuous_update=False, layout=wide, style=narrow
        )
        self.private = widgets.Checkbox(
            value=True, description="private", indent=False, layout=widgets.Layout(width="auto")
        )
        self.hub.observe(lambda _: self._ask("", self._draw), names="value")
        self.export_button = widgets.Button(description="Export", tooltip="Write it, read it back, compare")
        self.export_button.add_class("nt-primary")
        self.export_button.on_click(lambda _: self.export())
        self.status = widgets.HTML()
        self.bar = widgets.FloatProgress(
            min=0, max=1, layout=widgets.Layout(width="100%", height="8px", margin="8px 0 4px", display="none")
        )
        self.bar.add_class("nt-bar")
        self.told = widgets.HTML()
        self._hub_line = _line(self.repository, self.private)
        self._precision_line = _line(_label("Precision"), *self.precisions.values())
        title = widgets.HTML(
            f'<div class="nt-row"><span class="nt-name">Export</span>{chip(self.run.name)}'
            '<span class="nt-soft nt-small">read back and compared with the model in memory</span></div>'
        )
        cards = widgets.HBox(list(self.formats.values()), layout=widgets.Layout(flex_flow="row wrap"))
        cards.add_class("nt-formats")
        form = [title, cards, self._precision_line, _line(self.name, self.place), self.hub, self._hub_line]
        go = _line(self.export_button, self.status)
        go.add_class("nt-go")
        css = widgets.HTML(f"<style>{CSS}{_proof.CSS}</style>", layout=widgets.Layout(display="none"))
        inner = widgets.VBox([*form, go, self.bar, self.told])
        inner.add_class("nt-export")
        self.widget = widgets.VBox([style(), css, inner])
        for name in ("nbtune", "nt-card"):
            self.widget.add_class(name)

    def _format_button(self, name: str, why_not: str) -> widgets.Button:
        text = f"{_proof.TITLES[name]}\n{why_not or _USES[name]}"
        button = widgets.Button(description=text, disabled=bool(why_not))
        button.add_class("nt-method")
        button.on_click(lambda _: self.choose(name))
        return button

    def _precision_button(self, name: str) -> widgets.Button:
        button = widgets.Button(description=name)
        button.add_class("nt-chipped")
        button.on_click(lambda _: self.choose(self._format, name))
        return button

    def _choose(self, format: str, dtype: str | None) -> None:
        from nbtune.export import FORMATS

        self._format = format
        self._dtype = dtype or next(iter(FORMATS[format]), None)
        self._draw()

    def _count(self) -> None:
        from nbtune.models import describe

        self._parameters = describe(self.run.spec.model, on_status=self._say).parameters
        self._draw()

    def _draw(self) -> None:
        """Show what is chosen, and a name that is free where no other was typed."""
        from nbtune.export import FORMATS

        for name, button in self.formats.items():
            set_class(button, "nt-on", on=name == self._format)
        for name, button in self.precisions.items():
            show_if(button, name in FORMATS[self._format])
            set_class(button, "nt-on", on=name == self._dtype)
            button.description = self._precision(name)
        show_if(self._precision_line, bool(FORMATS[self._format]))
        show_if(self._hub_line, self.hub.value)
        if self.name.value in ("", self._suggested):
            self._suggested = self.name.value = _free_name(self._folder, self.run.name, self._format, self._dtype)
        self.place.value = f'<span class="nt-soft nt-small">in {escape(str(self._folder))}</span>'

    def _precision(self, name: str) -> str:
        """q8_0 · 8 bits · 143 MB: the size where it is the whole model's and that is known."""
        from nbtune.export.precision import PRECISIONS

        parts = [name, *([_WORDS[name]] if name in _WORDS else [])]
        if self._parameters is not None and self._format in ("merged", "gguf"):
            parts.append(size(self._parameters * PRECISIONS[name].bits / 8))
        return " · ".join(parts)

    def _export(self) -> None:
        from nbtune.export import export

        self.export_button.disabled = True
        self.told.value, self.bar.value, self.bar.layout.display = "", 0.0, None
        try:
            self.done = export(
                self.run.path,
                self.format,
                self._folder / _checked(self.name.value),
                dtype=self._dtype,
                push_to=self.repository.value.strip() if self.hub.value else None,
                private=self.private.value,
                on_status=self._say,
                on_progress=self._progress,
                quiet=True,
            )
            self.told.value = _proof.proof(self.done)
        finally:
            self._busy = False
            self.bar.layout.display = "none"
            self.export_button.disabled = False
            self._draw()

    def _progress(self, share: float) -> None:
        self.bar.value = share

    def _say(self, text: str) -> None:
        look = '<span class="nt-working nt-soft nt-small" role="status">'
        self.status.value = f"{look}{escape(text)}</span>" if text else ""

    def _failed(self, _: str, error: Exception) -> None:
        self.error = "".join(traceback.format_exception(error))
        known = isinstance(error, NbtuneError)
        text = str(error) if known else f"{type(error).__name__}\n{error}"
        self.told.value = notice(text, "error") + ("" if known else _reports.folded("Traceback", self.error))


def _line(*parts: widgets.Widget) -> widgets.HBox:
    line = widgets.HBox(parts, layout=widgets.Layout(**_WRAP))
    line.add_class("nt-asked")
    return line


def _label(text: str) -> widgets.HTML:
    return widgets.HTML(
        f'<span class="nt-soft nt-small">{text}</span>', layout=widgets.Layout(width="76px", margin="2px 0 2px 2px")
    )


def _unfit(spec: RunSpec) -> dict[str, str]:
    """Formats that this method cannot have, and why."""
    if spec.method == "full":
        return dict.fromkeys(("adapter", "gguf-lora"), "Every weight was trained: there is no adapter")
    if isinstance(spec.method, PromptLearningConfig):
        return dict.fromkeys(("merged", "gguf", "gguf-lora"), "A trained prompt is no change of a weight")
    return {} if type(spec.method) is LoraConfig else {"gguf-lora": "Only for LoRA"}


def _free_name(folder: Path, run: str, format: str, dtype: str | None) -> str:
    """`amber-heron-merged-bf16`, `amber-heron-q8_0.gguf`: with a number where that is taken."""
    from nbtune.export import report_path

    suffix = ".gguf" if format.startswith("gguf") else ""
    kind = {"gguf": "", "gguf-lora": "-lora"}.get(format, f"-{format}")
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in run).strip(".")
    stem = f"{plain}{kind}{f'-{dtype}' if dtype else ''}"
    tried = (f"{stem}{f'-{number}' if number else ''}{suffix}" for number in (0, *range(2, 10_000)))
    return next(name for name in tried if not _taken(folder / name, report_path(folder / name)))


def _taken(*paths: Path) -> bool:
    return any(path.exists() for path in paths)


def _checked(name: str) -> str:
    """A plain name. Raises ExportError for a path: the form writes into the notebook's folder only."""
    name = name.strip()
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise ExportError(
            f"{name!r} is no plain name", "The form writes into this folder.", "For another one: nt.export(run, ...)."
        )
    return name
