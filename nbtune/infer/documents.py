"""A file's bytes to text: PDF, Word, HTML, and everything that is text already.

    document = to_text("report.pdf", data)     # Document(kind="PDF, 3 pages", text="...", note="")

What a file is, its first bytes say; its name only decides between kinds of text. Nothing in a file is run, and nothing
that it names is fetched: no scripts, no external entities, no network.
"""

from __future__ import annotations

import dataclasses
import io
import re
import time
import zipfile
import zlib
from pathlib import PurePath
from typing import Any

from nbtune.errors import NbtuneError

MAX_HTML = 4_000_000  # bytes: a tree of it takes fifty times as much
MAX_UNPACKED = 16_000_000  # bytes of the XML in a Word document
MAX_PAGES = 1000  # of a PDF
MAX_PDF_SECONDS = 20.0  # looked at between pages

_PICTURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_PICTURE_NAMES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".avif")
_BINARY = {
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
    b"SQLite format 3": "a database",
}
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"}
_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # that stand in no text
_UNSEEN = ("script", "style", "template", "noscript", "svg", "iframe", "object")
_BLOCKS = "address article aside blockquote div dl dt dd footer form header hr main nav ol p pre section table tr ul"
# What is written before the text of an HTML element that begins a line.
_BEFORE = dict.fromkeys(("title", *_BLOCKS.split()), "\n") | {"br": "", "li": "\n- "}
_BEFORE |= {f"h{level}": f"\n{'#' * level} " for level in range(1, 7)}

# What damaged bytes make the parsers raise, beside their own errors.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class Document:
    """The text of a file."""

    kind: str  # "PDF, 3 pages", "Word", "HTML", "text"
    text: str
    note: str = ""  # what of the file is not in the text, or how it was read


def to_text(name: str, data: bytes) -> Document:
    """The text of a file. Raises NbtuneError where it is empty, damaged, encrypted, or of a kind that is not read."""
    if not data.strip():
        raise _refused(name, "is empty", "It has no text.", "Attach a file with text.")
    suffix = PurePath(name).suffix.lower()
    _require_readable(name, data)
    if b"%PDF-" in data[:1024] or suffix == ".pdf":
        document = _pdf(name, data)
    elif data.startswith(b"PK\x03\x04") or suffix == ".docx":
        document = _word(name, data)
    elif suffix in (".html", ".htm", ".xhtml"):
        document = _html(name, data)
    else:
        document = _plain(name, data)
    if not document.text.strip():
        raise _refused(name, "holds no text", "It may be a scan, or hold only pictures.", "Attach it as text.")
    return document


def picture_kind(name: str, data: bytes) -> str:
    """`PNG`, `JPEG`, ... by the first bytes of a picture, or by its name; empty for other files."""
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    known = next((kind for mark, kind in _PICTURES.items() if data.startswith(mark)), "WebP" if webp else "")
    suffix = PurePath(name).suffix.lower()
    return known or (suffix[1:].upper() if suffix in _PICTURE_NAMES else "")


def _require_readable(name: str, data: bytes) -> None:
    if kind := picture_kind(name, data):
        raise _refused(
            name,
            "is a picture",
            f"{kind} files are read only by models that take pictures; this one reads text.",
            "Describe it in words, or attach its text.",
        )
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise _refused(
            name,
            "cannot be read",
            "It is an Office file that a password protects, or one of the old kind (.doc, .xls, .ppt).",
            "Save it as .docx without a password, or as text.",
        )
    if what := next((what for mark, what in _BINARY.items() if data.startswith(mark)), ""):
        raise _binary(name, f"It is {what}.")


def _plain(name: str, data: bytes) -> Document:
    mark = next((mark for mark in _MARKS if data.startswith(mark)), None)
    try:
        text, note = data.decode(_MARKS[mark] if mark else "utf-8"), ""
    except UnicodeDecodeError:
        text, note = _guess(name, data)
    if found := _CONTROLS.search(text):
        raise _binary(name, f"Character {found.start() + 1:,} is 0x{ord(found.group()):02x}, which stands in no text.")
    return Document("text", text.replace("\r\n", "\n").replace("\r", "\n"), note)


def _guess(name: str, data: bytes) -> tuple[str, str]:
    """Text in an encoding that the file does not name, and which one was taken."""
    from charset_normalizer import from_bytes

    if b"\0" in data:
        raise _binary(name, f"Byte {data.index(0) + 1:,} is zero, which stands in no text.")
    best = from_bytes(data).best()
    if best is None:
        raise _refused(
            name, "is in an unknown encoding", "It is not UTF-8, nor any other that was tried.", "Save it as UTF-8."
        )
    return str(best), f"not UTF-8; read as {best.encoding}"


def _pdf(name: str, data: bytes) -> Document:
    import pypdf
    from pypdf.errors import DependencyError, PyPdfError, WrongPasswordError

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise WrongPasswordError
        count = len(reader.pages)
        pages = _pages(reader, count)
    except (DependencyError, WrongPasswordError) as error:
        raise _refused(
            name, "is encrypted", "The PDF opens only with a password.", "Save it without one, and attach that."
        ) from error
    except (PyPdfError, OSError, *_DAMAGE) as error:
        raise _damaged(name, "PDF", error) from error
    text = "\n\n".join(page for page in pages if page)
    note = f"only the first {len(pages):,} of {count:,} pages were read" if len(pages) < count else ""
    return Document(f"PDF, {count:,} page{'s' if count > 1 else ''}", text, note)


def _pages(reader: Any, count: int) -> list[str]:
    start, pages = time.monotonic(), []
    for number in range(min(count, MAX_PAGES)):
        if time.monotonic() - start > MAX_PDF_SECONDS:
            break
        pages.append(reader.pages[number].extract_text().strip())
    return pages


def _word(name: str, data: bytes) -> Document:
    import docx
    from docx.opc.exceptions import OpcError
    from docx.table import Table
    from docx.text.paragraph import Paragraph
    from lxml.etree import LxmlError

    try:
        document = docx.Document(_unpacked(name, data))
        lines = []
        for item in document.iter_inner_content():
            if isinstance(item, Paragraph):
                lines.append(_paragraph(item.text, (item.style and item.style.name) or ""))
            elif isinstance(item, Table):
                lines += [" | ".join(cell.text.replace("\n", " ") for cell in row.cells) for row in item.rows] + [""]
    except (OpcError, LxmlError, zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, *_DAMAGE) as error:
        raise _damaged(name, "Word document", error) from error
    return Document("Word", re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def _paragraph(text: str, style: str) -> str:
    if style == "Title" or style.startswith("Heading"):
        return f"\n{'#' * int(style[-1]) if style[-1:].isdigit() else '#'} {text}\n"
    return f"- {text}" if style.startswith("List") else f"{text}\n"


def _unpacked(name: str, data: bytes) -> io.BytesIO:
    """The archive without compression and pictures, unpacked with a limit: what it says of its sizes may be a lie."""
    left = MAX_UNPACKED
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as packed, zipfile.ZipFile(whole, "w") as copy:
        if "word/document.xml" not in packed.namelist():
            raise _refused(
                name, "cannot be read", "It is a ZIP archive that holds no Word document.", "Unpack it first."
            )
        for member in packed.infolist():
            parts: list[bytes] = []
            if member.filename.endswith((".xml", ".rels")):
                with packed.open(member) as file:
                    while part := file.read(1 << 16):
                        left -= len(part)
                        if left < 0:
                            raise _refused(
                                name,
                                "unpacks to too much",
                                f"It holds more than {MAX_UNPACKED / 1e6:.0f} MB of text and markup.",
                                "Attach a part of it.",
                            )
                        parts.append(part)
            if any(b"<!DOCTYPE" in part for part in parts[:1]):
                raise _refused(name, "is damaged", "It declares entities, as no Word document does.", "Save it again.")
            copy.writestr(member.filename, b"".join(parts))
    whole.seek(0)
    return whole


def _html(name: str, data: bytes) -> Document:
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue] - it is made when lxml is built

    if len(data) > MAX_HTML:
        raise _refused(
            name,
            "is too large for HTML",
            f"It has {len(data) / 1e6:.1f} MB; {MAX_HTML / 1e6:.0f} are read.",
            "Attach a part of it, or its text.",
        )
    page = _plain(name, data)
    # Its own word about its encoding does not count any more: it is text already.
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    root = etree.fromstring(page.text.encode(), parser)
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" or "depth" in entry.message for entry in parser.error_log):
        raise _refused(name, "is damaged", "Its tags stand in each other more than 256 deep.", "Attach its text.")
    return Document("HTML", "" if root is None else _lines(root), page.note)


def _lines(root: Any) -> str:
    """The text as a reader sees it: one line a block, the cells of a row with a bar between them."""
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue] - it is made when lxml is built

    parts: list[str] = []
    preformatted = 0
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        tag = str(element.tag)
        if event == "start":
            parts.append(_BEFORE.get(tag, ""))
            preformatted += tag == "pre"
            if tag in _UNSEEN:
                walk.skip_subtree()
            else:
                parts.append(_spaced(element.text, preformatted))
        else:
            preformatted -= tag == "pre"
            cell = tag in ("td", "th") and element.getnext() is not None
            parts.append(" | " if cell else "\n" if tag in _BEFORE else "")
            parts.append(_spaced(element.tail, preformatted))
    lines = (line.strip(" ") for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _spaced(text: str | None, preformatted: int) -> str:
    return (text or "") if preformatted else re.sub(r"\s+", " ", text or "")


def _refused(name: str, title: str, message: str, remedy: str) -> NbtuneError:
    return NbtuneError(f"{name} {title}", message, remedy)


def _binary(name: str, message: str) -> NbtuneError:
    return _refused(name, "is not text", message, "Attach text, code, PDF, Word (.docx) or HTML.")


def _damaged(name: str, kind: str, error: Exception) -> NbtuneError:
    said = str(error).strip().splitlines()
    return _refused(
        name,
        "is damaged",
        f"No {kind} can be read from it ({said[0] if said else type(error).__name__}).",
        "Save it again.",
    )
