"""The pages in docs/ say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOW_TO = ROOT / "docs" / "how-to-add-a-method.md"


def test_the_table_of_methods_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "docs" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == module.page(), "run docs/methods.py"


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n# (\S+)\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
)
def test_the_example_of_the_how_to_is_the_real_code(block):
    path, code = block
    assert code.strip() in (ROOT / path).read_text(encoding="utf-8")
