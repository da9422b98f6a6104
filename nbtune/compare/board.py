"""The columns of the chat: a line that says who answers, the conversation, and in blind mode a vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from nbtune.compare import look, ranking
from nbtune.compare.conversation import Conversation

if TYPE_CHECKING:
    from nbtune.compare.ballot import Ballot

# Narrowest column by their number: three side by side at 900 px, four in two rows there and in one at 1400 px.
MIN_WIDTH = {2: 320, 3: 262, 4: 320}

Changes = dict[Any, Any]  # Gradio's component -> its new value, or an update of it


class Board:
    """Draws the columns inside the Blocks that are being built: places for `columns`, and for `more` that may come."""

    def __init__(self, columns: Sequence[str], more: int, labels: Mapping[str, str], ballot: Ballot) -> None:
        self.labels = labels
        self.ballot = ballot
        self.conversation = gr.State(Conversation(tuple(columns)))
        self.places, self.heads, self.chats, self.votes = [], [], [], []
        with gr.Row(equal_height=True, elem_id="nb-columns"):
            for position in range(len(columns) + more):
                self._draw(position, columns)
        with gr.Row(elem_id="nb-votes"):
            self.blind = gr.Button("Blind", size="sm", scale=0, min_width=80, elem_id="nb-blind")
            self.tie = gr.Button("tie", size="sm", scale=0, min_width=56, visible=False, elem_classes="nb-vote")
            self.bad = gr.Button("all bad", size="sm", scale=0, min_width=76, visible=False, elem_classes="nb-vote")
            self.standings = gr.HTML(ranking.line(ballot))

    @property
    def outputs(self) -> list[Any]:
        """Every component that `drawn` changes."""
        return [
            *(self.conversation, self.standings, self.blind, self.tie, self.bad),
            *(*self.places, *self.heads, *self.chats, *self.votes),
        ]

    def drawn(self, conversation: Conversation) -> Changes:
        """All of a conversation as it is now."""
        order = conversation.order
        can_vote = conversation.can_vote
        drawn = self.said(conversation, order)
        for position, (place, vote) in enumerate(zip(self.places, self.votes, strict=True)):
            drawn[place] = gr.update(visible=position < len(order))
            drawn[vote] = gr.update(visible=can_vote and position < len(order))
        return {
            **drawn,
            self.conversation: conversation,
            self.standings: ranking.line(self.ballot),
            self.blind: gr.update(value="Blind ✓" if conversation.blind else "Blind"),
            self.tie: gr.update(visible=can_vote),
            self.bad: gr.update(visible=can_vote),
        }

    def said(self, conversation: Conversation, names: Sequence[str]) -> Changes:
        """What these columns say, and the lines above them."""
        said: Changes = {}
        last = conversation.turns[-1] if conversation.turns else None
        for position, name in enumerate(conversation.order):
            if name in names:
                shown, label = name, self.labels.get(name, "")
                if last is not None:
                    label = last.labels.get(name, label)
                if conversation.hidden:
                    shown, label = look.place(position, len(conversation.order)), ""
                said[self.heads[position]] = look.head(shown, label, last, name)
                said[self.chats[position]] = conversation.shown(name)
        return said

    def _draw(self, position: int, columns: Sequence[str]) -> None:
        there = position < len(columns)
        name = columns[position] if there else ""
        width = MIN_WIDTH.get(len(columns), 300)
        with gr.Column(min_width=width, visible=there, elem_classes="nb-column") as place:
            self.heads.append(gr.HTML(look.head(name, self.labels.get(name, ""))))
            self.chats.append(
                gr.Chatbot(
                    label=f"Column {position + 1}",  # a name would tell in blind mode
                    show_label=False,
                    container=False,
                    height=None,
                    buttons=["copy"],
                    layout="bubble",
                    editable="user",
                    group_consecutive_messages=False,  # files and question would be edited together
                    feedback_options=None,
                    placeholder=" ",
                    # A model may write anything; of HTML only what Markdown makes is shown, the rest as text.
                    allow_tags=False,
                    elem_classes="nb-chat",
                )
            )
            self.votes.append(gr.Button("this one is better", size="sm", visible=False, elem_classes="nb-vote"))
        self.places.append(place)
