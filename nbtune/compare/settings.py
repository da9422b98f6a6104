"""The arena's settings: system prompt, chat template, length, seed, files' budget, and every sampling value."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from nbtune.compare import look
from nbtune.compare.conversation import ChatSettings
from nbtune.infer.sampling import NEUTRAL, Sampling, settings_text

if TYPE_CHECKING:
    from nbtune.infer.engine import Engine

STEPS = {"temperature": 0.05, "top_p": 0.01, "top_k": 1, "min_p": 0.01, "repetition_penalty": 0.01}
LONGEST_ANSWER = 4096  # tokens, that can be asked for here
FILES = 2048  # tokens of files to begin with: what two cores read in seconds
_OTHERS = 5  # inputs before the sampling values


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """What the inputs of `SettingsPanel` say."""

    chat: ChatSettings
    budget: int  # tokens of files beside one question


class SettingsPanel:
    """Draws the settings inside the Blocks that are being built. `inputs` goes to handlers; `read` reads it there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        context = engine.context_length
        longest = min(context, LONGEST_ANSWER)
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
                1, longest, min(256, longest), step=1, label="max_new_tokens", info="Longest answer, in tokens."
            )
            self.seed = gr.Number(
                0, precision=0, minimum=0, label="seed", info="The same seed gives the same text; empty means 0."
            )
        source = f"<div class='nb-source'>Sampling starts from: {html.escape(engine.defaults.text)}.</div>"
        gr.HTML(source)
        with gr.Row():
            starting = engine.defaults.sampling
            self.sampling = {name: _slider(name, getattr(starting, name)) for name in Sampling.model_fields}
        with gr.Row():
            self.budget = gr.Slider(
                16,
                context,
                min(context // 4, FILES),
                step=16,
                label="Files",
                info="Tokens of files beside one question, at most.",
            )
            self.markdown = gr.Checkbox(True, label="Render Markdown", info="Off: the answers letter by letter.")
            self.reset = gr.Button("Back to the defaults", size="sm", scale=0, min_width=160, elem_id="nb-reset")
        with gr.Accordion("Chat template", open=False, elem_id="nb-template"):
            self.template = gr.Code(
                engine.chat_template, language="jinja2", label="Chat template", lines=8, max_lines=18, show_label=False
            )
            gr.HTML(
                "<div class='nb-source'>How messages become the text that the model reads. What you change here holds "
                "for your page only.</div>"
            )
        self.inputs: list[Any] = [
            *(self.system, self.length, self.seed, self.budget, self.template),
            *self.sampling.values(),
        ]

    def wire(self, chosen: gr.HTML, chats: Sequence[gr.Chatbot], private: dict[str, Any]) -> None:
        """`chosen` tells what the sampling is now; `private` holds what all quick handlers have in common."""
        knobs = list(self.sampling.values())
        gr.on([knob.change for knob in knobs], self._describe, inputs=knobs, outputs=chosen, **private)
        self.reset.click(self._defaults, outputs=[*knobs, self.template], **private)
        self.markdown.change(
            lambda markdown: [gr.update(render_markdown=markdown) for _ in chats],
            inputs=self.markdown,
            outputs=list(chats),
            **private,
        )

    def read(self, values: Sequence[Any]) -> PageSettings:
        """The values of `inputs`. Raises NbtuneError for one that is out of range."""
        system, length, seed, budget, template = values[:_OTHERS]
        sampling = Sampling.of(**dict(zip(Sampling.model_fields, values[_OTHERS:], strict=True)))
        edited = template if template != self.engine.chat_template else None
        return PageSettings(ChatSettings(sampling, length, seed or 0, system or "", edited), budget)

    def _defaults(self) -> list[Any]:
        return [*self.engine.defaults.sampling.model_dump().values(), self.engine.chat_template]

    def _describe(self, *knobs: float) -> str:
        sampling = Sampling.of(**dict(zip(Sampling.model_fields, knobs, strict=True)))
        if sampling == self.engine.defaults.sampling:
            return look.chip(self.engine.defaults.text)
        changed = [name for name in Sampling.model_fields if getattr(sampling, name) != getattr(NEUTRAL, name)]
        return look.chip(f"{settings_text(sampling, tuple(changed)) or 'temperature 1'}, set here")


def _slider(name: str, value: float) -> gr.Slider:
    field = Sampling.model_fields[name]
    limits = {key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le") if hasattr(item, key)}
    step = STEPS[name]
    low = limits["ge"] if "ge" in limits else limits["gt"] + step
    return gr.Slider(low, limits["le"], value, step=step, label=name, info=field.description, min_width=220)
