"""A weighted combination of the arena's adapters, set with sliders and answering in a column of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from nbtune.compare import look
from nbtune.compare.extra import Choice
from nbtune.errors import NbtuneError
from nbtune.infer.columns import BASE
from nbtune.infer.mix import Mix
from nbtune.kernels.low_rank import COMBINATION_TYPES

if TYPE_CHECKING:
    from nbtune.infer.engine import Engine


class Mixer:
    """The `Extra` of weighted combinations."""

    name = "mix "

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder  # where a combination is saved, by its name
        base = engine.base_of(BASE)
        self.adapters = [name for name in base.adapters if not base.prompted(name)]
        with gr.Accordion("Mix the adapters", open=False, visible=bool(self.adapters), elem_id="nb-mixer"):
            with gr.Row():
                self.shown = gr.Checkbox(False, label="Show the mix", info="As a column of its own.", elem_id="mix")
                self.kind = gr.Dropdown(
                    list(COMBINATION_TYPES), value="cat", label="combination_type", info="cat: the exact sum."
                )
                self.density = gr.Slider(
                    0.05, 1, 0.5, step=0.05, label="density", info="Share that is kept, where the type prunes."
                )
                self.sign = gr.Radio(
                    ["total", "frequency"],
                    value="total",
                    label="majority_sign_method",
                    info="How signs are chosen, where the type does.",
                )
            with gr.Row():
                share = round(1 / max(len(self.adapters), 1), 2)
                self.weights = [
                    gr.Slider(-1, 2, share, step=0.05, label=name, min_width=180, info="Weight.")
                    for name in self.adapters
                ]
            with gr.Row():
                self.saved_as = gr.Textbox("", label="Save as", placeholder="a new adapter's name", scale=2)
                self.save = gr.Button("Save", size="sm", scale=0, min_width=100, elem_id="nb-save-mix")
                self.saved = gr.HTML()
        self.inputs: list[Any] = [self.shown, self.kind, self.density, self.sign, *self.weights]

    def wire(self, model: dict[str, Any]) -> None:
        self.save.click(
            self._save, inputs=[self.saved_as, *self.inputs], outputs=self.saved, api_name="save_mix", **model
        )

    def preparing(self, values: Sequence[Any]) -> str | None:
        mix = self._mix(values)
        if self.engine.is_made(mix) or not mix.combination_type.endswith("_svd"):
            return None
        return f"{mix.combination_type} takes singular values of whole weights, up to a minute on a CPU."

    def choose(self, values: Sequence[Any], question: str) -> Choice:  # noqa: ARG002 - any question is answered by it
        mix = self._mix(values)
        text = " + ".join(f"{weight:g} {name}" for name, weight in mix.weights.items())
        column = self.engine.mix(mix)
        return Choice(column, f"{text}, {mix.combination_type}", counted_as=column)

    def _mix(self, values: Sequence[Any]) -> Mix:
        _, kind, density, sign, *weights = values
        used = {name: weight for name, weight in zip(self.adapters, weights, strict=True) if weight}
        return Mix(used, kind, density=density, majority_sign_method=sign)

    def _save(self, name: str, *values: Any) -> Iterator[str]:
        try:
            path = self._path(name or "")
            if waits := self.preparing(values):
                yield look.moment(waits)
            self.engine.save_mix(self._mix(values), path)
        except NbtuneError as error:
            yield look.problem(error)
            return
        yield look.told(f"Saved as {path}", "nbtune arena and PeftModel.from_pretrained read it.")

    def _path(self, name: str) -> Path:
        if not name or name != Path(name).name or name.startswith("."):
            raise NbtuneError("The adapter needs a name", f"{name!r} is none.", "Type one word, such as half-and-half.")
        return self.folder / name
