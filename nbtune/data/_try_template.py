"""Run as a script by `sandbox.py`: writes chats with a template in a process that may be killed.

    python -I _try_template.py < {"path": [...], "template": ..., "chats": [variables, ...]}

Prints how many characters the longest has, as JSON; null where memory ran out.
"""

from __future__ import annotations

import json
import sys
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
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The mark of an answer is read and changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    try:
        template = environment.from_string(given["template"])
        longest = max(length(template, chat) for chat in given["chats"])
    except TemplateError:  # no template at all
        longest = 0
    except (MemoryError, RecursionError):
        longest = None
    print(json.dumps(longest))  # noqa: T201 - the answer


def length(template: Any, chat: dict[str, Any]) -> int:
    from jinja2.exceptions import TemplateError

    try:
        return len(template.render(**chat))
    # What a template raises is shown where it is used; here it only has to end.
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return 0


if __name__ == "__main__":
    main()
