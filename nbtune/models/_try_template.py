"""Run as a script by `sandbox.py`: writes chats with a template in a process that may be killed.

    python -I _try_template.py < {"path": [...], "template": ..., "chats": [variables, ...], "longest": characters}

Prints a list with an object for each chat as JSON: its "text", why it was "refused", or "longer" with true where it has
more characters than `longest`; null in place of the list where memory ran out.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

try:
    import resource
except ImportError:  # Windows: the parent's clock is the only limit
    resource = None

SECONDS = 2
BYTES = 1 << 30


def main() -> None:
    given = json.load(sys.stdin)
    sys.path[:0] = given["path"]
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        written = [write(given["template"], chat, given["longest"]) for chat in given["chats"]]
    except (MemoryError, RecursionError):
        written = None
    print(json.dumps(written))  # noqa: T201 - the answer


def write(template: str, chat: dict[str, Any], longest: int) -> dict[str, Any]:
    from jinja2.exceptions import TemplateError

    try:
        text = environment().from_string(template).render(**chat)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        return {"refused": str(error)[:500] or type(error).__name__}
    return {"longer": True} if len(text) > longest else {"text": text}


def environment() -> Any:
    """What transformers gives to a chat template."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """The mark of an answer is read and changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Plain(Namespace):
        """No way to Python's inside."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*given: Any, **named: Any) -> Plain:
        found = Plain()
        for name, value in dict(*given, **named).items():
            found[name] = value
        return found

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = as_json
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": namespace,
    }
    return made


if __name__ == "__main__":
    main()
