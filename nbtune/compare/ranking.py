"""The arena's page of votes: how every column stands, and how sure that is."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from nbtune.compare.ballot import Ballot
    from nbtune.compare.standings import Standing

_HOW = (
    "The bar is the chance of being found better than a column of average strength (Bradley-Terry), the line its 95 % "
    "interval. A tie is half a vote for each; “all bad” says nothing about the order. Intervals that overlap "
    "much mean that more votes are needed."
)


class RankingTab:
    """Draws the standings inside the Blocks that are being built."""

    def __init__(self, ballot: Ballot) -> None:
        self.ballot = ballot
        self.table = gr.HTML(table(ballot))

    def wire(self, tab: gr.Tab, private: dict[str, Any]) -> None:
        """Draw again whenever the tab is opened."""
        tab.select(lambda: table(self.ballot), outputs=self.table, **private)


def line(ballot: Ballot) -> str:
    """All in one line: `41 votes · amber-heron 0.71 ± 0.09`."""
    count = _counted(ballot)
    if not count:
        return "<div class='nb-standings'><span>No votes yet. Blind mode hides names until you vote.</span></div>"
    shown = "".join(f"<span>{html.escape(standing.text)}</span>" for standing in ballot.standings())
    return f"<div class='nb-standings'><b>{_votes(count)}</b>{shown}</div>"


def table(ballot: Ballot) -> str:
    """Every column that was ever voted on beside one of the arena's."""
    count = len(ballot.votes)
    if not count:
        how = "Ask something in blind mode, and say which answer is better: the ranking appears here."
        return f"<div class='nb-ranking'><p>{how}</p></div>"
    columns = dict.fromkeys([*ballot.columns, *(name for vote in ballot.votes for name in vote.columns)])
    rows = "".join(_row(place, standing) for place, standing in enumerate(ballot.standings(list(columns)), 1))
    head = "<tr><th></th><th>column</th><th>chance of being better</th><th></th><th>won</th><th>tied</th><th>lost</th>"
    lost = f" {ballot.unreadable} lines of the file are no votes." if ballot.unreadable else ""
    where = f"{_votes(count)} in {html.escape(str(ballot.folder / 'votes.jsonl'))}.{lost}"
    return f"<div class='nb-ranking'><table>{head}</tr>{rows}</table><p>{where}</p><p>{_HOW}</p></div>"


def _row(place: int, standing: Standing) -> str:
    low, middle, high = (f"{100 * share:.1f}%" for share in (standing.lower, standing.probability, standing.upper))
    bar = (
        f"<div class='nb-bar'><i style='width:{middle}'></i><u style='left:{low};width:calc({high} - {low})'></u></div>"
    )
    name = html.escape(standing.column)
    figures = f"{standing.probability:.2f} <span>{standing.lower:.2f} to {standing.upper:.2f}</span>"
    return (
        f"<tr><td>{place}</td><td><b>{name}</b></td><td>{bar}</td><td>{figures}</td>"
        f"<td>{standing.wins}</td><td>{standing.ties}</td><td>{standing.losses}</td></tr>"
    )


def _counted(ballot: Ballot) -> int:
    """Votes on at least two of the arena's columns."""
    return sum(len(set(vote.columns) & set(ballot.columns)) > 1 for vote in ballot.votes)


def _votes(count: int) -> str:
    return "1 vote" if count == 1 else f"{count:,} votes"
