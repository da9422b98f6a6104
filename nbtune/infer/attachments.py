"""Files beside a question: read, put into the context within a budget of tokens, and told what was cut.

    attached = read(["notes.md", "report.pdf"], inside=uploads)
    context = fit(attached, budget=1500, tokenizer=engine.tokenizer)
    context.prompt("What changed?")       # the files, then the question
    [share.text for share in context.shares]      # "report.pdf: 1,204 of 9,310 tokens, cut after line 88 of 702"

Names and texts are those of the files: escape them before they are shown as HTML.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbtune.errors import NbtuneError
from nbtune.infer.documents import picture_kind, to_text
from nbtune.infer.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

    from nbtune.infer.pictures import PictureReader

MAX_FILES = 20
MAX_BYTES = 20_000_000  # of one file, looked at before it is read
MAX_CHARACTERS = 500_000  # of one file's text: as much as 125,000 tokens, counted in a second
_LEAST_TOKENS = 16  # of each file: with less there is no sense in attaching it


@dataclasses.dataclass(frozen=True)
class Attachment:
    """A file that was read."""

    name: str  # one line, no control characters; may hold HTML
    kind: str  # "PDF, 3 pages", "Word", "HTML", "text"
    text: str
    note: str = ""  # what of the file is not in the text, or how it was read
    picture: Image | None = None  # then there is no text


@dataclasses.dataclass(frozen=True)
class Share:
    """What one file got of the budget."""

    name: str
    kind: str
    tokens: int  # that the whole text has
    used: int  # that are in the context
    lines: int
    used_lines: int
    note: str = ""

    @property
    def cut(self) -> bool:
        return self.used < self.tokens

    @property
    def text(self) -> str:
        """For people: `report.pdf: 1,204 of 9,310 tokens, cut after line 88 of 702`."""
        size = f"{self.tokens:,} tokens"
        if self.cut:
            where = f"cut after line {self.used_lines:,} of {self.lines:,}" if self.used_lines else "cut within line 1"
            size = f"{self.used:,} of {size}, {where}"
        return f"{self.name}: {size}{f' ({self.note})' if self.note else ''}"


@dataclasses.dataclass(frozen=True)
class Context:
    """All files as one text, and the pictures before it."""

    text: str
    tokens: int  # of `text` and `pictures`; at most `budget`
    budget: int
    shares: tuple[Share, ...]
    pictures: tuple[Image, ...] = ()

    def prompt(self, question: str) -> str:
        """What the user's message is: the files, then the question."""
        return f"{self.text}\n\n{question}" if self.text else question

    def content(self, question: str) -> str | list[dict[str, Any]]:
        """That as a message's content: parts, where there are pictures."""
        if not self.pictures:
            return self.prompt(question)
        pictures: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self.pictures]
        return [*pictures, {"type": "text", "text": self.prompt(question)}]


def read(paths: Sequence[str | Path], *, inside: str | Path, pictures: bool = False) -> list[Attachment]:
    """The texts of these files, in their order. A relative path is looked up in the folder `inside`.

    pictures: whether the model takes them. Raises NbtuneError, before any file is used, that names every file which is
    outside of `inside`, a link, over `MAX_BYTES`, binary, damaged, encrypted or empty.
    """
    if len(paths) > MAX_FILES:
        raise NbtuneError("Too many files", f"There are {len(paths)}; {MAX_FILES} are read at once.", "Attach fewer.")
    attached: list[Attachment] = []
    errors: list[NbtuneError] = []
    for path in paths:
        try:
            attached.append(_read(Path(path), Path(inside), pictures))
        except NbtuneError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise NbtuneError(f"{len(errors)} files cannot be read", "\n".join(str(error) for error in errors))
    return _unique_names(attached)


def fit(
    attached: Sequence[Attachment],
    budget: int,
    tokenizer: PreTrainedTokenizerBase,
    pictures: PictureReader | None = None,
) -> Context:
    """Put the files into at most `budget` tokens, the names and borders of texts included.

    Pictures are never cut: what they leave is for the texts.

    Small files stay whole; what they leave is shared equally among the large ones, which are cut at a paragraph or a
    line. Control tokens of the model that stand in a file are broken up, so that no file can end a turn or begin one.
    Raises NbtuneError where the budget is too small to give each file a few words.
    """
    seen = [_seen(attachment, pictures) for attachment in attached if attachment.picture is not None]
    taken = sum(share.tokens for share, _ in seen)
    if taken > budget:
        message = f"{len(seen)} picture{'s' if len(seen) > 1 else ''} take {taken:,} of {budget:,} tokens."
        raise NbtuneError("The pictures do not fit into the context", message, "Attach fewer, or raise the budget.")
    texts = _fit_texts([attachment for attachment in attached if attachment.picture is None], budget - taken, tokenizer)
    shares = tuple(share for share, _ in seen) + texts.shares
    return Context(texts.text, taken + texts.tokens, budget, shares, tuple(picture for _, picture in seen))


def _seen(attachment: Attachment, pictures: PictureReader | None) -> tuple[Share, Image]:
    picture = attachment.picture
    if picture is None or pictures is None:
        raise NbtuneError(f"{attachment.name} is a picture", "This model reads text.", "Describe it in words.")
    tokens = pictures.tokens(picture)
    return Share(attachment.name, attachment.kind, tokens, tokens, 1, 1, attachment.kind), picture


def _fit_texts(attached: Sequence[Attachment], budget: int, tokenizer: PreTrainedTokenizerBase) -> Context:
    if not attached:
        return Context("", 0, budget, ())
    control = _control_tokens(tokenizer)
    texts = [_Text(attachment, tokenizer, control) for attachment in attached]
    fence = _fence(texts)
    sizes = [text.tokens for text in texts]
    room = min(sum(sizes), budget)
    while True:
        parts = [text.part(share) for text, share in zip(texts, _divide(sizes, room), strict=True)]
        joined = "\n\n".join(text.wrapped(part, fence) for text, part in zip(texts, parts, strict=True))
        tokens = _count(joined, tokenizer)
        if tokens <= budget:
            return Context(joined, tokens, budget, tuple(t.share(p) for t, p in zip(texts, parts, strict=True)))
        used = sum(text.used(part) for text, part in zip(texts, parts, strict=True))
        room = min(room, used) - (tokens - budget)
        if room < _LEAST_TOKENS * len(texts):
            raise NbtuneError(
                "The files do not fit into the context",
                f"{len(texts)} file{'s' if len(texts) > 1 else ''} in {budget:,} tokens.",
                "Attach fewer, shorten the conversation, or raise the budget.",
            )


class _Text:
    """One attachment's text, as this model's tokenizer reads it."""

    def __init__(
        self, attachment: Attachment, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str] | None
    ) -> None:
        self.attachment = attachment
        self.name, self.text, broken = attachment.name, attachment.text, 0
        if control is not None:
            self.text, broken = control.subn(_broken_up, self.text)
            self.name = control.sub(_broken_up, self.name)
        notes = [attachment.note, f"{broken} control token{'s' if broken > 1 else ''} broken up" if broken else ""]
        self.note = "; ".join(note for note in notes if note)
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.ends = [end for _, end in encoded["offset_mapping"]]  # pyright: ignore[reportGeneralTypeIssues]
        self.tokens = len(self.ends)

    def part(self, share: int) -> str:
        """The beginning of the text that takes at most `share` tokens."""
        if share >= self.tokens:
            return self.text
        head = self.text[: self.ends[share - 1]] if share > 0 else ""
        for border, least in (("\n\n", 0.75), ("\n", 0.5), (" ", 0.5)):
            found = head.rfind(border)
            if found >= least * len(head) and found > 0:
                return head[:found]
        return head

    def used(self, part: str) -> int:
        """How many tokens of the text are in a part of it."""
        return self.tokens if part == self.text else bisect.bisect_right(self.ends, len(part))

    def wrapped(self, part: str, fence: str) -> str:
        """The part between fences, under the file's name."""
        cut = (
            ""
            if part == self.text
            else f"\n(The file goes on; {self.used(part):,} of {self.tokens:,} tokens are here.)"
        )
        return f"File {self.name}:\n{fence}\n{part.rstrip()}\n{fence}{cut}"

    def share(self, part: str) -> Share:
        whole = part == self.text
        lines = _lines(self.text)
        # A part that ends within a line does not count that line.
        used_lines = lines if whole else part.count("\n") + self.text.startswith("\n", len(part))
        used = self.used(part)
        return Share(self.attachment.name, self.attachment.kind, self.tokens, used, lines, used_lines, self.note)


def _lines(text: str) -> int:
    return text.rstrip("\n").count("\n") + 1


def _divide(sizes: Sequence[int], room: int) -> list[int]:
    """How much of `room` each gets: the small all they want, the others equal parts of what is left."""
    shares = [0] * len(sizes)
    left = len(sizes)
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        shares[index] = min(sizes[index], max(room, 0) // left)
        room -= shares[index]
        left -= 1
    return shares


def _count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fence(texts: Sequence[_Text]) -> str:
    """More backticks in a row than any of the texts has."""
    longest = max((len(run) for text in texts for run in re.findall("`{3,}", text.text)), default=2)
    return "`" * (longest + 1)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What the tokenizer reads as one special token wherever it stands, such as `<|im_end|>`."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None


def _broken_up(match: re.Match[str]) -> str:
    return f"{match.group()[0]} {match.group()[1:]}"


def _read(path: Path, folder: Path, pictures: bool) -> Attachment:
    name = _name(path)
    data = _bytes(name, path, folder)
    if pictures and picture_kind(name, data):
        picture = open_picture(name, data)
        return Attachment(name, f"picture, {picture.width} x {picture.height}", "", picture=picture)
    document = to_text(name, data)
    note = document.note
    if len(document.text) > MAX_CHARACTERS:
        note = f"{note}; " if note else ""
        note += f"only the first {MAX_CHARACTERS:,} of {len(document.text):,} characters were read"
    return Attachment(name, document.kind, document.text[:MAX_CHARACTERS], note)


def _bytes(name: str, path: Path, folder: Path) -> bytes:
    """The bytes of a plain file inside the folder."""
    path = folder / path
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte
        inside = False
    # Of what is outside nothing is told, not even whether it exists.
    if not inside or path.is_symlink():
        raise NbtuneError(f"{name} is not read", "Only files in the upload folder are, and no links.", "Upload it.")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise NbtuneError(f"{name} is not read", "It is a folder or a device, not a file.", "Attach its files.")
        if found.st_size > MAX_BYTES:
            raise NbtuneError(
                f"{name} is too large",
                f"It has {found.st_size / 1e6:,.1f} MB; up to {MAX_BYTES / 1e6:.0f} MB are read.",
                "Attach a part of it.",
            )
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise NbtuneError(f"{name} cannot be read", f"{error.strerror or error}.", "Upload it again.") from error


def _name(path: Path) -> str:
    """The file's name on one line: control characters, line breaks and marks that turn the writing become `?`."""
    return "".join("?" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in path.name) or "?"


def _unique_names(attached: Sequence[Attachment]) -> list[Attachment]:
    names: set[str] = set()
    unique: list[Attachment] = []
    for attachment in attached:
        name, number = attachment.name, 2
        while name in names:
            name, number = f"{attachment.name} ({number})", number + 1
        names.add(name)
        unique.append(dataclasses.replace(attachment, name=name))
    return unique
