"""A real tokenizer, and real rows where NBTUNE_SAMPLE_DATA names a folder with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm_tokenizer() -> Any:
    from nbtune.models import load_tokenizer
    from nbtune.spec import ModelSpec

    return load_tokenizer(ModelSpec(name="smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def samples() -> Path:
    folder = os.environ.get("NBTUNE_SAMPLE_DATA")
    if not folder:
        pytest.skip("NBTUNE_SAMPLE_DATA is not set")
    return Path(folder)
