"""What a page of the wizard is, and what it may ask of the wizard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ipywidgets as widgets

from nbtune.spec import RunSpec
from nbtune_widgets.live import dispose

Act = Callable[[], Any]


class Page(Protocol):
    """One step. The wizard shows `widget`, and has the page read again what depends on the spec."""

    @property
    def widget(self) -> widgets.DOMWidget: ...

    def refresh(self, spec: RunSpec) -> None:
        """Read what the spec names and show it; called on the worker's thread while the page is on the screen.

        Raises NbtuneError where it cannot: the wizard shows the error.
        """


@dataclass(frozen=True)
class Host:
    """The wizard, as its pages see it."""

    act: Callable[[Act], Callable[[Any], None]]  # makes a callback of a function, one that keeps and shows its error
    button: Callable[..., widgets.Button]  # (text, act, tooltip="")
    change: Callable[[Mapping[str, Any], str], None]  # settings by path, and why: said with what was changed, undoable
    lead: Callable[[str], None]  # to the page of a setting, by its path
    say: Callable[[str], None]  # what is being done now; "" for nothing
    ask: Callable[..., None]  # (key, status, work, idle=False): done on the worker's thread, the latest of each key


def replace(box: widgets.Box, children: Sequence[widgets.Widget]) -> None:
    """Give a box other children and the former ones back: ipywidgets keeps what is not closed."""
    former = box.children
    box.children = children
    dispose(*former)
