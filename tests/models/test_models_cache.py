"""Converting a GGUF once: whole or not at all, by one process, again where it was damaged."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbtune.errors import ModelError
from nbtune.models import cache


@pytest.fixture
def conversions(tmp_path, tiny_folder, monkeypatch) -> list[Path]:
    """A cache folder of its own, and a conversion that copies a ready folder; the list says how often it ran."""
    monkeypatch.setenv("NBTUNE_CACHE", str(tmp_path / "cache"))
    done: list[Path] = []

    def convert(gguf: Path, folder: Path, dtype: str) -> None:
        time.sleep(0.2)
        shutil.copytree(tiny_folder, folder)
        done.append(folder)

    monkeypatch.setattr(cache, "_convert", convert)
    return done


def test_converted_once_and_said_so(conversions, tiny_gguf_file):
    messages: list[str] = []
    first = cache.converted(tiny_gguf_file, messages.append)
    assert cache.converted(tiny_gguf_file, messages.append) == first
    assert conversions == [first]
    assert len(messages) == 1
    assert "Tiny-Model.gguf" in messages[0]


def test_other_content_is_another_folder(conversions, tiny_gguf_file, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny_gguf_file, copy)
    first = cache.converted(copy, print)
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert cache.converted(copy, print) != first
    assert len(conversions) == 2


def test_many_at_once_convert_once(conversions, tiny_gguf_file):
    folders: list[Path] = []
    messages: list[str] = []
    threads = [
        threading.Thread(target=lambda: folders.append(cache.converted(tiny_gguf_file, messages.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(conversions) == 1
    assert sum("Waiting" in message for message in messages) == 3


@pytest.mark.parametrize("damage", ["cut", "header", "no config", "no tokenizer"])
def test_damaged_folder_is_made_again(conversions, tiny_gguf_file, damage):
    folder = cache.converted(tiny_gguf_file, print)
    weights = folder / "model.safetensors"
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "header":
            weights.write_bytes(b"\xff" * 4000)
        case "no config":
            (folder / "config.json").unlink()
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
    assert cache.converted(tiny_gguf_file, print) == folder
    assert len(conversions) == 2
    assert cache._is_whole(folder)


def test_killed_conversion_leaves_nothing_that_counts(conversions, tiny_gguf_file, tmp_path):
    program = (
        "import sys; from pathlib import Path; from nbtune.models import cache\n"
        "cache.converted(Path(sys.argv[1]), lambda message: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tiny_gguf_file)])
    models = tmp_path / "cache" / "models"
    while not [path for path in models.glob(".*") if path.is_dir()]:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path for path in models.iterdir() if not path.name.startswith(".")]

    folder = cache.converted(tiny_gguf_file, print)
    assert [path for path in models.iterdir() if path.is_dir()] == [folder]  # the remains are gone too


def test_cache_that_cannot_be_written(monkeypatch, tiny_gguf_file, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NBTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set NBTUNE_CACHE"):
        cache.converted(tiny_gguf_file, print)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_cache_folder_of_the_platform(monkeypatch, platform):
    monkeypatch.delenv("NBTUNE_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache.root().name == "nbtune"
    assert cache.root().is_absolute()


@pytest.mark.slow
def test_truncated_gguf(monkeypatch, tiny_gguf_file, tmp_path):
    monkeypatch.setenv("NBTUNE_CACHE", str(tmp_path / "cache"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf_file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cut short") as caught:
        cache.converted(cut, print)
    assert str(cut) in caught.value.message
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
