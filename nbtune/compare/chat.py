"""The arena's chat: one prompt, one column per model, streamed together.

Gradio's event handlers run in worker threads, one `Conversation` in a `gr.State` per browser tab. Every handler that
generates has the same `concurrency_id`: there is one model, so one question is answered at a time and others wait.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from nbtune.compare import look
from nbtune.compare.board import Board, Changes
from nbtune.compare.conversation import NO_FILES, Conversation, Question, Turn, answer
from nbtune.compare.extra import Choice, Extra
from nbtune.compare.settings import SettingsPanel
from nbtune.compare.stops import Stops
from nbtune.errors import NbtuneError
from nbtune.infer.attachments import Context, fit, read

if TYPE_CHECKING:
    from nbtune.compare.ballot import Ballot
    from nbtune.infer.engine import Engine

EXAMPLES = (
    "What does `os.path.join` do in Python?",
    "What does `itertools.groupby` return?",
    "How do I read a CSV file in Python?",
    "Explain list comprehensions in two sentences.",
)
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


class ChatTab:
    """Draws the chat inside the Blocks that are being built, and holds its handlers.

    extras: make the panels of columns that can be shown beside the engine's. chosen: tells what the sampling is.
    """

    def __init__(
        self,
        engine: Engine,
        labels: Mapping[str, str],
        ballot: Ballot,
        extras: Sequence[Callable[[], Extra]],
        chosen: gr.HTML,
        stops: Stops,
    ) -> None:
        self.engine = engine
        self.ballot = ballot
        self.stops = stops
        self.board = Board(engine.columns, len(extras), labels, ballot)
        self._draw()
        self.extras = [extra() for extra in extras]
        self.settings.wire(chosen, self.board.chats, PRIVATE)
        self._wire()

    def _draw(self) -> None:
        self.notice = gr.HTML(visible=False)
        with gr.Row(elem_id="nb-ask"):
            self.prompt = gr.MultimodalTextbox(
                placeholder=f"Ask {look.count(len(self.engine.columns))} at once. Files can be dropped here.",
                show_label=False,
                label="Prompt",
                container=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                scale=1,
                file_count="multiple",
                submit_btn=False,
                elem_id="nb-prompt",
            )
            self.send = gr.Button("Send", variant="primary", scale=0, min_width=84, elem_id="nb-send")
            self.stop = gr.Button("Stop", interactive=False, scale=0, min_width=76, elem_id="nb-stop")
            self.again = gr.Button("Regenerate", scale=0, min_width=110, elem_id="nb-again")
            self.clear = gr.Button("Clear", scale=0, min_width=76, elem_id="nb-clear")
        self.attached = gr.State(())  # paths that `files` tells of
        self.files = gr.HTML(visible=False)
        with gr.Row(elem_id="nb-examples"):
            self.examples = [gr.Button(text, size="sm", scale=0, elem_classes="nb-example") for text in EXAMPLES]
            self.total = gr.HTML()
        title = "Settings: system prompt, length, sampling, files, chat template"
        with gr.Accordion(title, open=False, elem_id="nb-settings"):
            self.settings = SettingsPanel(self.engine)

    def _wire(self) -> None:
        conversation, inputs = self.board.conversation, self.settings.inputs
        extras = [field for extra in self.extras for field in extra.inputs]
        drawn = [*self.board.outputs, self.notice, self.total]
        writing = [*drawn, self.prompt, self.files, self.attached, self.send, self.stop]
        again: dict[str, Any] = {"inputs": [conversation, *inputs, *extras], "outputs": writing, **MODEL}
        asking: dict[str, Any] = again | {"inputs": [self.prompt, *again["inputs"]]}
        idle: dict[str, Any] = {"fn": _idle, "outputs": [self.send, self.stop], **PRIVATE}

        sent = gr.on([self.send.click, self.prompt.submit], self._send, api_name="compare", **asking)
        sent.then(**idle)
        for button, text in zip(self.examples, EXAMPLES, strict=True):
            js = f"() => ({json.dumps({'text': text, 'files': []})})"
            typed = button.click(None, js=js, outputs=self.prompt, **PRIVATE)
            typed.then(self._send, api_visibility="private", **asking).then(**idle)
        self.again.click(self._regenerate, api_name="regenerate", **again).then(**idle)
        for position, chat in enumerate(self.board.chats):
            chat.retry(self._retry(position), api_visibility="private", **again).then(**idle)
            chat.edit(self._edit(position), api_visibility="private", **again).then(**idle)
        self.prompt.change(
            self._weigh,
            inputs=[self.prompt, self.attached, self.settings.budget],
            outputs=[self.files, self.attached],
            trigger_mode="always_last",
            **PRIVATE,
        )

        self.stop.click(self.stops.end, api_name="stop", queue=False, show_progress="hidden")
        # In the model's queue: a conversation is not changed under an answer that is still being written.
        own: dict[str, Any] = {"inputs": conversation, "outputs": drawn, **MODEL}
        self.clear.click(self.stops.end, **PRIVATE).then(self._clear, api_name="clear", **own)
        self.board.blind.click(self.stops.end, **PRIVATE).then(self._toggle_blind, api_name="blind", **own)
        shown = [extra.shown for extra in self.extras]
        showing: dict[str, Any] = own | {"inputs": [conversation, *shown]}
        for box in shown:
            box.change(self.stops.end, **PRIVATE).then(self._show, api_name=f"show_{box.elem_id}", **showing)
        for extra in self.extras:
            extra.wire(MODEL)
        voting: dict[str, Any] = {"inputs": [conversation, *inputs], "outputs": drawn, **MODEL}
        for position, button in enumerate(self.board.votes):
            button.click(self._vote(position), api_name=f"vote_{position + 1}", **voting)
        self.board.tie.click(self._vote_tie, api_name="vote_tie", **voting)
        self.board.bad.click(self._vote_bad, api_name="vote_all_bad", **voting)

    # Asking

    def _send(
        self, request: gr.Request, typed: dict[str, Any] | None, conversation: Conversation, *values: Any
    ) -> Iterator[Changes]:
        def changes() -> Iterator[Changes]:
            said = typed or {}
            text, paths = said.get("text") or "", said.get("files") or []
            budget = self.settings.read(values[: len(self.settings.inputs)]).budget
            question = Question(_required(text), self._files(paths, budget))
            if conversation.blind and conversation.voted:
                conversation.begin()
            yield from self._answers(request, conversation, question, len(conversation.turns), values)

        yield from self._told(changes())

    def _regenerate(self, request: gr.Request, conversation: Conversation, *values: Any) -> Iterator[Changes]:
        yield from self._told(self._answers_again(request, conversation, conversation.order, values))

    def _retry(self, position: int) -> Callable[..., Iterator[Changes]]:
        """A handler that answers the last question again in one column."""

        def retry(request: gr.Request, conversation: Conversation, *values: Any) -> Iterator[Changes]:
            only = conversation.order[position : position + 1]
            yield from self._told(self._answers_again(request, conversation, only, values))

        return retry

    def _edit(self, position: int) -> Callable[..., Iterator[Changes]]:
        """A handler that asks an earlier question in other words, of all columns. What came after it is dropped."""

        def edit(
            request: gr.Request, edited: gr.EditData, conversation: Conversation, *values: Any
        ) -> Iterator[Changes]:
            def changes() -> Iterator[Changes]:
                number = conversation.turn_of(conversation.order[position], _index(edited.index))
                question = dataclasses.replace(conversation.turns[number].question, text=_required(str(edited.value)))
                yield from self._answers(request, conversation, question, number, values)

            # What was typed over stands on the page already.
            yield from self._told(changes(), refused=lambda: self.board.drawn(conversation))

        return edit

    def _answers_again(
        self, request: gr.Request, conversation: Conversation, names: Sequence[str], values: Sequence[Any]
    ) -> Iterator[Changes]:
        if not conversation.turns:
            raise NbtuneError("There is nothing to answer again", "", "Ask something first.")
        turn = conversation.turns[-1]
        before = len(conversation.turns) - 1
        yield from self._answers(request, conversation, turn.question, before, values, turn, names)

    def _answers(
        self,
        request: gr.Request,
        conversation: Conversation,
        question: Question,
        before: int,
        values: Sequence[Any],
        turn: Turn | None = None,
        names: Sequence[str] = (),
    ) -> Iterator[Changes]:
        """The answers of these columns (all) to a question after the first `before` turns; `turn` where it has some."""
        names = names or conversation.order
        count = len(self.settings.inputs)
        settings = self.settings.read(values[:count]).chat
        tries = turn.tries + 1 if turn else 0
        settings = dataclasses.replace(settings, seed=settings.seed + tries)
        waits = " ".join(self._preparing(names, values[count:]))
        if waits:
            yield {self.notice: gr.update(value=look.moment(waits), visible=True)}
        choices = self._choices(names, values[count:], question.text)
        with self.stops.listening(request) as should_stop:
            messages = {name: conversation.messages(name, settings, question, before) for name in names}
            columns = {name: choice.column for name, choice in choices.items()}
            views = answer(self.engine, messages, columns, settings, should_stop)
            turn = turn or Turn(question)
            turn.tries = tries
            turn.labels |= {name: choice.label for name, choice in choices.items() if choice.label}
            turn.counted_as |= {name: choice.counted_as for name, choice in choices.items() if choice.counted_as}
            conversation.turns[before:] = [turn]
            conversation.voted = False
            for number, view in enumerate(views):
                turn.take(view)
                whole = number == 0 or view.done
                yield {
                    **(self.board.drawn(conversation) if whole else self.board.said(conversation, names)),
                    **(self._begun() if number == 0 else {}),
                    self.total: look.total(view),
                }

    def _choices(self, names: Sequence[str], values: Sequence[Any], question: str) -> dict[str, Choice]:
        """Which of the engine's columns answers in each of these."""
        choices = {name: Choice(name) for name in names if name in self.engine.columns}
        return choices | {extra.name: extra.choose(own, question) for extra, own in self._asked(names, values)}

    def _preparing(self, names: Sequence[str], values: Sequence[Any]) -> list[str]:
        """What takes long before these columns answer."""
        return [text for extra, own in self._asked(names, values) if (text := extra.preparing(own))]

    def _asked(self, names: Sequence[str], values: Sequence[Any]) -> Iterator[tuple[Extra, Sequence[Any]]]:
        """The extras among these columns, each with what its own inputs say."""
        for extra in self.extras:
            own, values = values[: len(extra.inputs)], values[len(extra.inputs) :]
            if extra.name in names:
                yield extra, own

    def _begun(self) -> Changes:
        return {
            self.prompt: {"text": "", "files": []},
            self.files: gr.update(value="", visible=False),
            self.attached: (),
            self.notice: gr.update(value="", visible=False),
            self.send: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }

    def _told(self, changes: Iterator[Changes], refused: Callable[[], Changes] = dict) -> Iterator[Changes]:
        """The changes; an error becomes a notice. What the user typed stays in its box and is not lost."""
        try:
            yield from changes
        except NbtuneError as error:
            send, stop = _idle()
            yield {**refused(), **self._problem(error), self.send: send, self.stop: stop}

    def _problem(self, error: NbtuneError) -> Changes:
        return {self.notice: gr.update(value=look.problem(error), visible=True)}

    # Files

    def _files(self, paths: Sequence[str], budget: int) -> Context:
        if not paths:
            return NO_FILES
        pictures = self.engine.pictures
        attached = read(paths, inside=get_upload_folder(), pictures=pictures is not None)
        return fit(attached, budget, self.engine.tokenizer, pictures)

    def _weigh(self, typed: dict[str, Any] | None, known: tuple[str, ...], budget: int) -> Changes:
        """Say what of the attached files will be read, when they have changed."""
        paths = tuple((typed or {}).get("files") or ())
        if paths == known:
            return {self.files: gr.skip(), self.attached: gr.skip()}
        try:
            told = look.attached(self._files(paths, budget)) if paths else ""
        except NbtuneError as error:
            told = look.problem(error)
        return {self.files: gr.update(value=told, visible=bool(paths)), self.attached: paths}

    # Votes

    def _vote(self, position: int) -> Callable[..., Changes]:
        def vote(conversation: Conversation, *values: Any) -> Changes:
            return self._voted(conversation, conversation.order[position : position + 1], values)

        return vote

    def _vote_tie(self, conversation: Conversation, *values: Any) -> Changes:
        return self._voted(conversation, conversation.order, values)

    def _vote_bad(self, conversation: Conversation, *values: Any) -> Changes:
        return self._voted(conversation, (), values)

    def _voted(self, conversation: Conversation, best: Sequence[str], values: Sequence[Any]) -> Changes:
        """Count the vote, and show who was who."""
        try:
            if not conversation.can_vote:
                raise NbtuneError("This vote does not count", "It takes whole answers in blind mode.", "Ask something.")
            self.ballot.cast(conversation, best, self.settings.read(values).chat)
        except NbtuneError as error:
            return self._problem(error)
        conversation.voted = True
        told = gr.update(value=look.revealed(conversation.order), visible=True)
        return {**self.board.drawn(conversation), self.notice: told}

    def _toggle_blind(self, conversation: Conversation) -> Changes:
        conversation.blind = not conversation.blind
        if conversation.blind:
            conversation.begin()
        return self._fresh(conversation)

    def _show(self, conversation: Conversation, *shown: bool) -> Changes:
        extras = (extra.name for extra, is_shown in zip(self.extras, shown, strict=True) if is_shown)
        conversation.shows((*self.engine.columns, *extras))
        return self._fresh(conversation)

    def _clear(self, conversation: Conversation) -> Changes:
        conversation.begin()
        return self._fresh(conversation)

    def _fresh(self, conversation: Conversation) -> Changes:
        return {**self.board.drawn(conversation), self.notice: gr.update(value="", visible=False), self.total: ""}


def _required(text: str) -> str:
    if not text.strip():
        raise NbtuneError("There is no question", "", "Type one, or choose an example.")
    return text


def _idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)


def _index(index: int | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]
