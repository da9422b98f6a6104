"""The chat template: the model's own or a standard one, its text to edit, tried on a row of the data as one types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import ipywidgets as widgets

from nbtune.chat_templates import STANDARD, chat_template
from nbtune.errors import DataError
from nbtune.spec import RunSpec
from nbtune_widgets import _tokens
from nbtune_widgets._page import Host
from nbtune_widgets._style import notice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbtune.data import Chat
    from nbtune.data.report import DataReport
    from nbtune.data.templates import Finding

TEMPLATE = "model.chat_template"
OWN, WRITTEN = "the model's own", "your own text"
# What only the templates of one family write, for a name to call them by.
_FAMILIES = {
    "<|im_start|>": "ChatML", "<|start_header_id|>": "Llama 3", "<start_of_turn>": "Gemma", "[INST]": "Mistral",
    "<|end|>": "Phi-3", "<|user|>": "Zephyr",
}  # fmt: skip


_HINT = '<div class="nt-help">Change the text: the row is written here with it as you type.</div>'


class TemplateEditor:
    """Which template writes the chats, whether it is sound, and a text to change with its effect beside it.

    Args:
        host: The wizard.
        number: Tells which row it is tried on.
    """

    def __init__(self, host: Host, number: Callable[[], int]) -> None:
        self._host = host
        self._number = number
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._report: DataReport | None = None
        self._used = ""  # the text that the settings mean
        self.said = ""  # which template it is, and whether the checks are good
        self._filling = False
        self.choice = widgets.Dropdown(
            description="Written as", options=[OWN, *STANDARD], style={"description_width": "128px"},
            layout=widgets.Layout(width="290px"))  # fmt: skip
        self.choice.observe(host.act(self._chosen), names="value")
        self.about, self.checks = widgets.HTML(layout=widgets.Layout(flex="1 1 200px", min_width="0")), widgets.HTML()
        self.text = widgets.Textarea(rows=10, layout=widgets.Layout(width="auto", flex="1 1 380px", min_width="0"))
        self.text.observe(host.act(self._typed), names="value")
        self.trial = widgets.HTML(layout=widgets.Layout(flex="1 1 320px", min_width="0"))
        self.use = host.button("Use this text", self.use_text, "Write the chats of this run with it")
        self.undo = host.button("Undo", self._fill, "Back to the text that is used")
        self.open = widgets.ToggleButton(description="▸ Text", tooltip="Read and change the template")
        self.open.add_class("nt-link")
        self.open.observe(host.act(self._unfold), names="value")
        top = widgets.HBox([self.choice, self.about], layout=widgets.Layout(flex_flow="row wrap"))
        top.add_class("nt-line")
        side = widgets.HBox([self.text, self.trial], layout=widgets.Layout(flex_flow="row wrap"))
        side.add_class("nt-columns")
        self._editing = widgets.VBox([side, widgets.HBox([self.use, self.undo])])
        self.widget = widgets.VBox([top, self.checks, self.open, self._editing])
        self._unfold()

    def show(self, spec: RunSpec, tokenizer: PreTrainedTokenizerBase, report: DataReport | None) -> None:
        """Show and check the template of these settings. Called on the worker's thread."""
        self._tokenizer, self._report = tokenizer, report
        given = spec.model.chat_template
        has_own = given is not None or bool(tokenizer.chat_template)
        self._filling = True
        own = OWN if has_own else "none: choose one"
        self.choice.options = [own, *STANDARD, *([WRITTEN] if given and given not in STANDARD else [])]
        self.choice.value = own if given is None else given if given in STANDARD else WRITTEN
        self._filling = False
        used = "" if not has_own else str(tokenizer.chat_template) if given is None else chat_template(given)
        if used != self._used:
            self._used = used
            self._fill()
        self.about.value = f'<span class="nt-help">{escape(_about(used))}</span>'
        found = self._findings(used) if used else []
        self.checks.value = _ticks(found) if used else ""
        self.said = _name(given, used) + (" ✓" if not found else "") if used else "none"

    def use_text(self) -> None:
        """As a click: the text in the box becomes the setting."""
        self._host.change({TEMPLATE: self.text.value}, "chat template")

    def _chosen(self) -> None:
        if not self._filling and self.choice.value != WRITTEN:
            name = str(self.choice.value)
            self._host.change({TEMPLATE: name if name in STANDARD else None}, "chat template")

    def _fill(self) -> None:
        self.text.value = self._used
        self._typed()

    def _typed(self) -> None:
        """Try what is in the box, on the worker; of several askings the last counts."""
        changed = self.text.value != self._used
        self.use.disabled = self.undo.disabled = not changed
        if changed and self.text.value.strip():
            self._host.ask("template", "Trying the template …", self._try)
        else:
            self.trial.value = _HINT

    def _try(self) -> None:
        text = self.text.value
        found = _ticks(self._findings(text))
        row = self._row(text)
        if text == self.text.value:
            self.trial.value = found + row

    def _row(self, text: str) -> str:
        """The row as this text writes it; "" where it cannot."""
        number = self._number()
        if self._report is None or number not in self._report.numbers:
            return ""
        try:
            examples = self._report.written(number, text)
        except (DataError, ValueError):  # said by the checks
            return ""
        shown = "".join(_tokens.row(pieces, self._report.max_length) for pieces in examples)
        return f'<div class="nt-tokens" tabindex="0" aria-label="Row {number}, tried">{shown}</div>'

    def _findings(self, text: str) -> list[Finding]:
        from nbtune.data.templates import check_template

        assert self._tokenizer is not None
        return check_template(text, self._tokenizer, self._chat())

    def _chat(self) -> Chat | None:
        """The row to try it on; None where it is not used, or is plain text, which no template writes."""
        if self._report is None or self._number() not in self._report.numbers:
            return None
        chat = self._report.chat(self._number())
        return None if chat.raw else chat

    def _unfold(self) -> None:
        self._editing.layout.display = None if self.open.value else "none"
        self.open.description = f"{'▾' if self.open.value else '▸'} Text"


def _about(text: str) -> str:
    """What is seen of a template without trying it."""
    if not text:
        return "The model has no chat template: chats cannot be trained on until one is chosen."
    family = _family(text)
    like = f"like {family}'s, " if family else ""
    tools = ", writes function calls" if "tools" in text else ", knows no functions"
    return f"{like}{len(text.splitlines()):,} lines{tools}"


def _name(given: str | None, text: str) -> str:
    """A few words for a template: its name, or whose it is like."""
    if given in STANDARD:
        return str(given)
    family = _family(text)
    return ("your own" if given else "the model's") + (f", like {family}" if family else "")


def _family(text: str) -> str:
    return next((name for mark, name in _FAMILIES.items() if mark in text), "")


def _ticks(findings: Sequence[Finding]) -> str:
    """The checks with a tick each, and what is to be said of those without."""
    from nbtune.data.templates import CHECKS

    failed = {finding.check: finding for finding in findings}
    broken = any(finding.severity == "error" for finding in findings)
    ticks = []
    for name, words in CHECKS.items():
        if broken and name not in failed:  # it could not be tried
            continue
        bad = name in failed
        mark = "✗" if bad else "✓"
        ticks.append(f'<span class="nt-tick{" nt-no" if bad else ""}"><b>{mark}</b>{escape(words)}</span>')
    said = "".join(
        notice(
            "\n".join(part for part in (found.title, found.message, found.remedy) if part),
            "error" if found.severity == "error" else "",
        )
        for found in findings
    )
    return f'<div class="nt-ticks nt-small">{"".join(ticks)}</div>{said}'
