"""The arena's page: one prompt, one column per model, streamed together by one generator.

Gradio's event handlers run in worker threads, one set of `gr.State` per browser tab. Every handler that generates has
the same `concurrency_id`: there is one model, so one question is answered at a time and others wait in the queue.
"""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from nbtune.compare import look
from nbtune.compare.chat import ChatSettings, History, View, ask
from nbtune.errors import NbtuneError
from nbtune.infer.sampling import NEUTRAL, Sampling, settings_text

if TYPE_CHECKING:
    from nbtune.infer.engine import Engine

EXAMPLES = (
    "What does `os.path.join` do in Python?",
    "What does `itertools.groupby` return?",
    "How do I read a CSV file in Python?",
    "Explain list comprehensions in two sentences.",
)
STEPS = {"temperature": 0.05, "top_p": 0.01, "top_k": 1, "min_p": 0.01, "repetition_penalty": 0.01}
# Narrowest column by their number: three side by side at 900 px, four in two rows there and in one at 1400 px.
MIN_WIDTH = {2: 320, 3: 262, 4: 320}


class Page:
    """Builds the Blocks and holds its handlers. `blocks` is ready to launch."""

    def __init__(self, engine: Engine, labels: Mapping[str, str]) -> None:
        self.engine = engine
        self.labels = labels
        self._stops: dict[str, threading.Event] = {}  # by session: set to end that session's answer
        with gr.Blocks(title="nbtune arena", analytics_enabled=False, fill_width=True) as self.blocks:
            self._draw()
            self._wire()
        self.blocks.queue(default_concurrency_limit=1, max_size=32, api_open=False)

    def close(self) -> None:
        """End every answer that is being written, and stop serving."""
        for stop in tuple(self._stops.values()):
            stop.set()
        self.blocks.close(verbose=False)

    def _draw(self) -> None:
        self.histories = gr.State({name: [] for name in self.engine.columns})
        with gr.Row(elem_id="nb-top"):
            gr.HTML(self._title())
            self.chosen = gr.HTML(look.chip(self.engine.defaults.text), elem_id="nb-chosen", scale=0, min_width=200)
            self.dark = gr.Button("◐", elem_id="nb-dark", size="sm", scale=0, min_width=40)
        self.heads, self.chats = self._draw_columns()
        self.notice = gr.HTML(visible=False)
        with gr.Row(elem_id="nb-ask"):
            self.prompt = gr.Textbox(
                "",
                placeholder=f"Ask {look.count(len(self.engine.columns))} at once. Shift+Enter starts a new line.",
                show_label=False,
                label="Prompt",
                container=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                scale=1,
                elem_id="nb-prompt",
            )
            self.send = gr.Button("Send", variant="primary", scale=0, min_width=84, elem_id="nb-send")
            self.stop = gr.Button("Stop", interactive=False, scale=0, min_width=76, elem_id="nb-stop")
            self.clear = gr.Button("Clear", scale=0, min_width=76, elem_id="nb-clear")
        with gr.Row(elem_id="nb-examples"):
            self.examples = [gr.Button(text, size="sm", scale=0, elem_classes="nb-example") for text in EXAMPLES]
            self.total = gr.HTML()
        with gr.Accordion("Settings: system prompt, length, sampling", open=False, elem_id="nb-settings"):
            self._draw_settings()

    def _title(self) -> str:
        engine = self.engine
        count = len(engine.columns)
        facts = (
            engine.spec.name,
            f"{look.count(count)}, one base in memory",
            f"{look.dtype_name(engine.dtype)} · {engine.device.type}",
        )
        return (
            f"<div class='nb-title'><b>nbtune</b><span>arena</span>{''.join(look.chip(fact) for fact in facts)}</div>"
        )

    def _draw_columns(self) -> tuple[list[gr.HTML], list[gr.Chatbot]]:
        heads, chats = [], []
        with gr.Row(equal_height=True, elem_id="nb-columns"):
            for name in self.engine.columns:
                width = MIN_WIDTH.get(len(self.engine.columns), 300)
                with gr.Column(min_width=width, elem_classes="nb-column"):
                    heads.append(gr.HTML(self._head(name)))
                    chat = gr.Chatbot(
                        label=name,
                        show_label=False,
                        container=False,
                        height=None,
                        buttons=["copy"],
                        layout="bubble",
                        feedback_options=None,
                        placeholder=" ",
                        # A model may write anything; of HTML only what Markdown makes is shown, the rest as text.
                        allow_tags=False,
                        elem_classes="nb-chat",
                    )
                    chats.append(chat)
        return heads, chats

    def _draw_settings(self) -> None:
        longest = min(self.engine.context_length, 4096)
        with gr.Row():
            self.system = gr.Textbox(
                "",  # Gradio sends None for a box that has never been shown, unless it has a value
                label="System prompt",
                info="Empty: what the model's chat template says by itself.",
                lines=2,
                max_lines=8,
                scale=2,
            )
            self.length = gr.Slider(
                1,
                longest,
                min(256, longest),
                step=1,
                label="max_new_tokens",
                info="Longest answer, in tokens.",
            )
            self.seed = gr.Number(
                0, precision=0, minimum=0, label="seed", info="The same seed gives the same text; empty means 0."
            )
        gr.HTML(f"<div class='nb-source'>Sampling starts from: {html.escape(self.engine.defaults.text)}.</div>")
        with gr.Row():
            self.sampling = {
                name: _slider(name, getattr(self.engine.defaults.sampling, name)) for name in Sampling.model_fields
            }
        with gr.Row():
            self.markdown = gr.Checkbox(True, label="Render Markdown", info="Off: the answers letter by letter.")
            self.reset = gr.Button("Back to the defaults", size="sm", scale=0, min_width=160, elem_id="nb-reset")

    def _wire(self) -> None:
        knobs = list(self.sampling.values())
        generate: dict[str, Any] = {
            "inputs": [self.prompt, self.histories, self.system, self.length, self.seed, *knobs],
            "outputs": [
                self.prompt,
                self.histories,
                self.notice,
                self.send,
                self.stop,
                self.total,
                *self.heads,
                *self.chats,
            ],
            "fn": self._compare,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "hidden",
        }
        private: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        idle: dict[str, Any] = {"fn": _idle, "outputs": [self.send, self.stop], **private}
        asked = gr.on([self.send.click, self.prompt.submit], api_name="compare", **generate)
        asked.then(**idle)
        for button, text in zip(self.examples, EXAMPLES, strict=True):
            filled = button.click(None, js=f"() => {json.dumps(text)}", outputs=self.prompt, **private)
            filled.then(api_visibility="private", **generate).then(**idle)
        self.stop.click(self._stop, api_name="stop", queue=False, show_progress="hidden")
        cleared = [self.histories, self.notice, self.total, *self.heads, *self.chats]
        # In the model's queue: a conversation is not cleared under an answer that is still being written.
        self.clear.click(self._stop, **private).then(
            self._clear,
            outputs=cleared,
            api_name="clear",
            concurrency_id="model",
            show_progress="hidden",
        )
        gr.on([knob.change for knob in knobs], self._describe, inputs=knobs, outputs=self.chosen, **private)
        self.reset.click(self._defaults, outputs=knobs, **private)
        self.markdown.change(self._render, inputs=self.markdown, outputs=self.chats, **private)
        self.dark.click(None, js=look.TOGGLE_DARK, **private)
        self.blocks.unload(self._stop)

    def _compare(
        self,
        request: gr.Request,  # Gradio gives it by its type
        question: str,
        histories: dict[str, History],
        system: str,
        length: int,
        seed: int | None,
        *knobs: float,
    ) -> Iterator[tuple[Any, ...]]:
        session = request.session_hash or ""
        stop = self._stops[session] = threading.Event()
        try:
            sampling = Sampling.of(**dict(zip(Sampling.model_fields, knobs, strict=True)))
            views = ask(
                self.engine, histories, question, ChatSettings(sampling, length, seed or 0, system), stop.is_set
            )
            for number, view in enumerate(views):
                heads = [self._head(name, view) for name in self.engine.columns]
                chats = [view.histories[name] for name in self.engine.columns]
                first = number == 0
                yield (
                    "" if first else gr.skip(),
                    view.histories if view.done else gr.skip(),
                    gr.update(value="", visible=False) if first else gr.skip(),
                    gr.update(interactive=False) if first else gr.skip(),
                    gr.update(interactive=True) if first else gr.skip(),
                    look.total(view),
                    *heads,
                    *chats,
                )
        except NbtuneError as error:
            # The question stays in its box: what the user typed is not lost.
            kept = [gr.skip() for _ in (self.total, *self.heads, *self.chats)]
            yield gr.skip(), gr.skip(), gr.update(value=look.problem(error), visible=True), *_idle(), *kept
        finally:
            self._stops.pop(session, None)

    def _stop(self, request: gr.Request) -> None:
        stop = self._stops.get(request.session_hash or "")
        if stop is not None:
            stop.set()

    def _clear(self) -> tuple[Any, ...]:
        columns = self.engine.columns
        hidden = gr.update(value="", visible=False)
        return (
            {name: [] for name in columns},
            hidden,
            "",
            *(self._head(name) for name in columns),
            *([] for _ in columns),
        )

    def _defaults(self) -> list[float]:
        return list(self.engine.defaults.sampling.model_dump().values())

    def _describe(self, *knobs: float) -> str:
        sampling = Sampling.of(**dict(zip(Sampling.model_fields, knobs, strict=True)))
        if sampling == self.engine.defaults.sampling:
            return look.chip(self.engine.defaults.text)
        changed = [name for name in Sampling.model_fields if getattr(sampling, name) != getattr(NEUTRAL, name)]
        return look.chip(f"{settings_text(sampling, tuple(changed)) or 'temperature 1'}, set here")

    def _render(self, markdown: bool) -> list[Any]:
        return [gr.update(render_markdown=markdown) for _ in self.chats]

    def _head(self, name: str, view: View | None = None) -> str:
        return look.head(name, self.labels.get(name, ""), view)


def _slider(name: str, value: float) -> gr.Slider:
    field = Sampling.model_fields[name]
    limits = {key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le") if hasattr(item, key)}
    step = STEPS[name]
    low = limits["ge"] if "ge" in limits else limits["gt"] + step
    return gr.Slider(low, limits["le"], value, step=step, label=name, info=field.description, min_width=220)


def _idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)
