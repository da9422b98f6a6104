"""The arena's page of prompt sets: many prompts through all columns, their answers side by side, and measures."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from nbtune.compare import look
from nbtune.compare.board import Changes
from nbtune.compare.prompts import PromptSet, read_prompts
from nbtune.compare.promptset import Evaluation, Progress
from nbtune.compare.results import SUFFIXES, Results
from nbtune.compare.stops import Stops
from nbtune.errors import NbtuneError

if TYPE_CHECKING:
    from nbtune.infer.engine import Engine
    from nbtune.spec import DataSpec

MOST_ROWS = 1000  # that the page takes at once; `nbtune evaluate` takes any number
_LONGEST_CELL = 600  # characters of a text in the table; the files have all


class PromptSetTab:
    """Draws the page inside the Blocks that are being built, and holds its handlers.

    data: by name, what the compared runs were trained on, whose held-out rows can be chosen. Of other files only those
    that were uploaded are read.
    """

    def __init__(self, engine: Engine, data: Mapping[str, DataSpec], stops: Stops, model: dict[str, Any]) -> None:
        self.engine = engine
        self.data = dict(data)
        self.stops = stops
        self._draw()
        self._wire(model)

    def _draw(self) -> None:
        with gr.Row(elem_id="nb-set"):
            self.lines = gr.Textbox(
                "", label="Prompts", info="One a line.", lines=9, max_lines=9, scale=2, elem_id="nb-lines"
            )
            self.file = gr.File(
                label="Or a file: .jsonl, .json, .csv, .parquet, .txt", type="filepath", height=276, scale=2
            )
            with gr.Column(scale=1, min_width=220):
                self.chosen = gr.Dropdown(
                    list(self.data), value=None, label="Or held-out rows", info="Of what a run was trained on."
                )
                self.limit = gr.Slider(1, MOST_ROWS, 20, step=1, label="Rows", info="The first of them.")
                self.length = gr.Slider(1, 1024, 64, step=1, label="max_new_tokens", info="Longest answer, in tokens.")
        with gr.Row(elem_id="nb-set-run"):
            self.run = gr.Button("Run", variant="primary", scale=0, min_width=84, elem_id="nb-run")
            self.stop = gr.Button("Stop", scale=0, min_width=76, interactive=False, elem_id="nb-set-stop")
            self.progress = gr.HTML("<span class='nb-label'>Greedy answers, all columns of a prompt together.</span>")
        self.told = gr.HTML(visible=False)
        self.answers = gr.Dataframe(
            visible=False, wrap=True, interactive=False, label="Answers", max_height=620, elem_id="nb-answers"
        )
        self.files = gr.File(label="Download", visible=False, interactive=False, file_count="multiple", height=130)

    def _wire(self, model: dict[str, Any]) -> None:
        outputs = [self.run, self.stop, self.progress, self.told, self.answers, self.files]
        inputs = [self.lines, self.file, self.chosen, self.limit, self.length]
        self.run.click(self._run, inputs=inputs, outputs=outputs, api_name="prompt_set", **model)
        self.stop.click(self.stops.end, api_visibility="private", queue=False, show_progress="hidden")

    def _run(
        self, request: gr.Request, lines: str, file: str | None, chosen: str | None, limit: int, length: int
    ) -> Iterator[Changes]:
        shown = bar(Progress(0, 0, 0.0))
        try:
            prompts = self._prompts(lines or "", file, chosen or "", limit)
            evaluation = Evaluation(self.engine, prompts, max_new_tokens=length)
            with self.stops.listening(request) as should_stop:
                for progress in evaluation.steps(should_stop):
                    shown = bar(progress)
                    yield {
                        self.run: gr.update(interactive=False),
                        self.stop: gr.update(interactive=True),
                        self.progress: shown,
                    }
            yield {**self._shown(evaluation.results()), self.progress: shown}
        except NbtuneError as error:
            yield {self.told: gr.update(value=look.problem(error), visible=True), **self._idle()}

    def _prompts(self, lines: str, file: str | None, chosen: str, limit: int) -> PromptSet:
        given = [text for text in lines.splitlines() if text.strip()]
        named = [name for name, value in (("lines", given), ("a file", file), ("held-out rows", chosen)) if value]
        if len(named) != 1:
            said = f"There are {' and '.join(named)}." if named else "There is none."
            raise NbtuneError("Choose one set of prompts", said, "Type lines, drop a file, or choose a run's rows.")
        if file:
            path = Path(file).resolve()
            if not path.is_relative_to(Path(get_upload_folder()).resolve()):
                raise NbtuneError("This file is not read", "Only files that were uploaded are.", "Upload it.")
            return read_prompts(str(path), limit=limit)
        if chosen:
            if chosen not in self.data:
                raise NbtuneError(f"There is no data of {chosen}", f"There is: {', '.join(self.data)}.")
            return read_prompts(self.data[chosen], limit=limit, tokenizer=self.engine.tokenizer)
        return read_prompts(given, limit=limit)

    def _shown(self, results: Results) -> Changes:
        folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
        table = answers(results)
        texts = len(table["headers"]) - 1
        widths = ["8%", *[f"{92 / texts:.2f}%"] * texts]
        files = [str(results.write(folder / f"answers{suffix}")) for suffix in SUFFIXES] if results.rows else []
        return {
            self.told: gr.update(value=measures(results), visible=True),
            self.answers: gr.update(value=table, visible=bool(results.rows), column_widths=widths),
            self.files: gr.update(value=files or None, visible=bool(files)),
            **self._idle(),
        }

    def _idle(self) -> Changes:
        return {self.run: gr.update(interactive=True), self.stop: gr.update(interactive=False)}


def bar(progress: Progress) -> str:
    """How far it is, and how long it still takes."""
    eta = progress.eta_seconds
    left = "" if not eta else f" · {eta:.0f} s left"
    share = 100 * progress.done / max(progress.total, 1)
    text = f"{progress.done:,} of {progress.total:,} answers{left}"
    drawn = f"<div class='nb-bar'><i style='width:{share:.1f}%'></i></div>"
    return f"<div class='nb-progress'>{drawn}<span>{text}</span></div>"


def measures(results: Results) -> str:
    """The measures of each column, with their differences to the base."""
    rows = results.summary()
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in (rows[0] if rows else ()))
    body = "".join(f"<tr>{''.join(_cell(value) for value in row.values())}</tr>" for row in rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in results.footnotes)
    return f"<div class='nb-ranking nb-measures'><table><tr>{head}</tr>{body}</table>{notes}</div>"


def answers(results: Results) -> dict[str, Sequence[Any]]:
    """What Gradio's table takes: prompt, reference, and what each column says."""
    has_reference = any(row.reference is not None for row in results.rows)
    headers = ["row", "prompt", *(["reference"] if has_reference else []), *results.columns]
    data = []
    for row in results.rows:
        cells = [row.cells[column] for column in results.columns]
        said = [cell.problem or cell.answer or "" for cell in cells]
        reference = [row.reference or ""] if has_reference else []
        data.append([row.place, *(_cut(text) for text in (row.prompt, *reference, *said))])
    return {"headers": headers, "data": data}


def _cell(value: Any) -> str:
    main, comma, more = str(value).partition(",")
    return f"<td>{html.escape(main)}{f'<br><span>{html.escape(more.strip())}</span>' if comma else ''}</td>"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]} …"
