"""The arena's page: a bar that says what is compared, and under it the chat, sets of prompts and the votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import gradio as gr

from nbtune.compare import look
from nbtune.compare.chat import MODEL, PRIVATE, ChatTab
from nbtune.compare.promptset_tab import PromptSetTab
from nbtune.compare.ranking import RankingTab
from nbtune.compare.stops import Stops

if TYPE_CHECKING:
    from nbtune.compare.ballot import Ballot
    from nbtune.compare.extra import Extra
    from nbtune.infer.engine import Engine
    from nbtune.spec import DataSpec


class Page:
    """Builds the Blocks and holds its tabs. `blocks` is ready to launch."""

    def __init__(
        self,
        engine: Engine,
        labels: Mapping[str, str],
        ballot: Ballot,
        extras: Sequence[Callable[[], Extra]] = (),
        data: Mapping[str, DataSpec] | None = None,
    ) -> None:
        self.engine = engine
        self.stops = Stops()
        with gr.Blocks(
            title="nbtune arena", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
        ) as self.blocks:
            with gr.Row(elem_id="nb-top"):
                gr.HTML(self._title())
                chosen = gr.HTML(look.chip(engine.defaults.text), elem_id="nb-chosen", scale=0, min_width=200)
                dark = gr.Button("◐", elem_id="nb-dark", size="sm", scale=0, min_width=40)
            with gr.Tabs(elem_id="nb-tabs"):
                with gr.Tab("Chat"):
                    self.chat = ChatTab(engine, labels, ballot, extras, chosen, self.stops)
                with gr.Tab("Prompt set"):
                    PromptSetTab(engine, data or {}, self.stops, MODEL)
                with gr.Tab("Votes") as votes:
                    RankingTab(ballot).wire(votes, PRIVATE)
            dark.click(None, js=look.TOGGLE_DARK, **PRIVATE)
            self.blocks.unload(self.stops.end)
        self.blocks.queue(default_concurrency_limit=1, max_size=32, api_open=False)

    def close(self) -> None:
        """End every answer that is being written, and stop serving."""
        self.stops.end_all()
        self.blocks.close(verbose=False)

    def _title(self) -> str:
        engine = self.engine
        facts = (
            engine.spec.name,
            f"{look.count(len(engine.columns))}, {_bases(engine)}",
            f"{look.dtype_name(engine.dtype)} · {engine.device.type}",
        )
        return (
            f"<div class='nb-title'><b>nbtune</b><span>arena</span>{''.join(look.chip(fact) for fact in facts)}</div>"
        )


def _bases(engine: Engine) -> str:
    count = len({engine.base_of(column) for column in engine.columns})
    return "one base in memory" if count == 1 else f"{count} models"
