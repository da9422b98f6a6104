"""The Review step: memory and time, what stands in the way with its remedies, and the same run as code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as widgets

from nbtune import echo
from nbtune.spec import RunSpec
from nbtune_widgets import _cards
from nbtune_widgets._page import Host, replace
from nbtune_widgets._style import duration, notice
from nbtune_widgets.specform import SpecForm

if TYPE_CHECKING:
    from nbtune.check import Problem, Remedy

FORMS = ("Python", "command", "YAML", "notebook")
SAMPLED = 200  # rows whose tokens are counted to tell how many steps an epoch has


class ReviewPage:
    """What will happen, before it does.

    Args:
        form: Of the whole run.
        host: The wizard.
    """

    def __init__(self, form: SpecForm, host: Host) -> None:
        self._form = form
        self._host = host
        self.memory, self.time = widgets.HTML(), widgets.HTML()
        self.problems = widgets.VBox()
        self.echo = widgets.ToggleButtons(options=FORMS, style={"button_width": "auto"})
        self.echo.add_class("nt-tabs")
        self.echo.observe(host.act(lambda: self.show_code(form.spec)), names="value")
        self.code, self.written = widgets.HTML(), widgets.HTML(layout=widgets.Layout(flex="1 1 auto"))
        self.write_button = host.button(
            "Write the notebook", lambda: self.write(form.spec), "Into this folder, under a new name"
        )
        self.save_button = host.button(
            "Save the rows", lambda: self.save_rows(form.spec), "Into a new .jsonl file of this folder"
        )
        self._buttons = widgets.HBox([self.write_button, self.save_button, self.written])
        headings = [
            widgets.HTML(f'<div class="nt-heading">{text}</div>')
            for text in ("Memory and time", "Before it starts", "The same run as code")
        ]
        parts = [headings[0], self.memory, self.time, headings[1], self.problems]
        self.widget = widgets.VBox([*parts, headings[2], self.echo, self.code, self._buttons])
        self.widget.add_class("nt-review")

    def refresh(self, spec: RunSpec) -> None:
        from nbtune.check import check
        from nbtune.models.trained import default_runs_dir

        self.show_code(spec)
        replace(self.problems, [])
        problems = check(spec, runs_dir=default_runs_dir())
        good = '<div class="nt-problem nt-good"><span class="nt-b">Nothing stands in the way.</span></div>'
        self.problems.children = [self._problem(found) for found in problems] or [widgets.HTML(good)]
        self.memory.value = self.time.value = ""
        if not any(found.severity == "error" for found in problems):
            self._show_plan(spec)

    def show_code(self, spec: RunSpec) -> None:
        """The run in the form that is chosen."""
        shown = str(self.echo.value)
        in_memory = spec.data.rows is not None
        self.save_button.layout.display = None if in_memory and shown != "Python" else "none"
        self.write_button.layout.display = None if shown == "notebook" and not in_memory else "none"
        if in_memory and shown != "Python":
            text = (
                "The rows are only in this notebook.\nSave them to a file; then the run has a form that stands alone."
            )
            self.code.value = notice(text)
            return
        if shown == "notebook":
            cells = (cell.source for cell in echo.notebook(spec).cells if cell.cell_type == "code")
            self.code.value = _cards.pre("\n\n".join(cells))
            return
        texts = {"Python": echo.python, "command": echo.command, "YAML": RunSpec.to_yaml}
        self.code.value = _cards.pre(texts[shown](spec))

    def write(self, spec: RunSpec) -> Path:
        """Write the run as a papermill notebook beside this one, under a new name."""
        path = echo.write_notebook(spec, Path())
        self.written.value = notice(
            f"Written: {path}\nOpen it and run all cells, or run it with: papermill {path} out.ipynb", "info"
        )
        return path

    def save_rows(self, spec: RunSpec) -> Path:
        """Give rows that are only in this notebook a file."""
        saved = echo.save_rows(spec, Path())
        self._form.load(saved)
        self.written.value = notice(f"Written: {saved.data.source}", "info")
        return Path(saved.data.source)

    def _show_plan(self, spec: RunSpec) -> None:
        """The memory and the time of the run; where it goes by epochs, its steps are counted on a sample of rows."""
        from nbtune.plan import plan

        steps = spec.training.max_steps if spec.training.max_steps > 0 else _steps(spec)
        planned = plan(spec.updated(max_steps=steps))
        self.memory.value = _cards.memory(planned)
        count = f"{steps:,} steps" if spec.training.max_steps > 0 else f"about {steps:,} steps"
        seconds = f", about <b>{duration(planned.seconds)}</b>" if planned.seconds is not None else ""
        self.time.value = f'<div class="nt-time">{count}{seconds}, without evaluation</div>'

    def _problem(self, found: Problem) -> widgets.DOMWidget:
        """A problem with its remedies as buttons, or one that leads to the setting it is about."""
        text = widgets.HTML(_cards.problem(found), layout=widgets.Layout(flex="1 1 360px", min_width="0"))
        buttons = [self._remedy(remedy) for remedy in found.remedies]
        if not buttons and found.setting in self._form.fields:
            setting = self._form.fields[found.setting].setting
            buttons = [self._host.button(f"Change {setting.label.lower()}", lambda: self._host.lead(setting.path))]
        if not buttons:
            return text
        row = widgets.HBox([text, *buttons], layout=widgets.Layout(flex_flow="row wrap", align_items="center"))
        row.add_class("nt-remedies")
        return row

    def _remedy(self, remedy: Remedy) -> widgets.Button:
        return self._host.button(remedy.label, lambda: self._host.change(remedy.changes, remedy.label))


def _steps(spec: RunSpec) -> int:
    """About how many steps all epochs have: those of a sample of the rows, times as many."""
    from nbtune.data import Batches, encode_many, read_rows
    from nbtune.models import load_tokenizer

    rows, training = read_rows(spec.data).train, spec.training
    sample = rows[:: max(1, len(rows) // SAMPLED)]
    encoded = encode_many(sample, load_tokenizer(spec.model))
    examples = [one.cut(training.max_length) for of_row in encoded for one in of_row]
    batches = Batches(
        examples,
        training.per_device_train_batch_size,
        training.max_length,
        packing=training.packing,
        seed=training.seed,
        virtual_tokens=spec.virtual_tokens,
    )
    micro_batches = batches.steps_per_epoch(1) * len(rows) / len(sample)
    return max(1, math.ceil(micro_batches / training.gradient_accumulation_steps * training.num_train_epochs))
