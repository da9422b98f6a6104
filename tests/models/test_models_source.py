"""Finding a model: every way to name one, and what a person is told where there is none."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from nbtune.errors import ModelError
from nbtune.models import resolve
from nbtune.models import source as source_module
from nbtune.models.source import Source
from nbtune.spec import ModelSpec


def find(name: str | Path, **settings) -> Source:
    return resolve(ModelSpec(name=str(name), **settings))


def refused(name: str | Path, **settings) -> ModelError:
    with pytest.raises(ModelError) as caught:
        find(name, **settings)
    assert caught.value.title
    return caught.value


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", " smollm2-135m-instruct "])
def test_packaged_name(name):
    source = find(name)
    assert source.kind == "packaged"
    assert source.name == source.origin == "smollm2-135m-instruct"
    assert (source.path / source.gguf_file).stat().st_size > 50e6


def test_packaged_name_without_its_package(monkeypatch):
    monkeypatch.setitem(source_module.PACKAGED, "elsewhere-1b", ("no_such_package", "x.gguf", "pip install x"))
    error = refused("elsewhere-1b")
    assert "no-such-package" in error.message
    assert "pip install x" in error.remedy


def test_gguf_file(tiny_gguf_file):
    source = find(tiny_gguf_file)
    assert (source.kind, source.path, source.gguf_file) == ("gguf", tiny_gguf_file.parent, tiny_gguf_file.name)
    assert source.origin == str(tiny_gguf_file)


def test_folder(tiny_folder, monkeypatch):
    assert find(tiny_folder).kind == "folder"
    monkeypatch.chdir(tiny_folder.parent)
    assert find("tiny-llama").origin == find("./tiny-llama").origin == str(tiny_folder)


def test_missing_path_names_the_near_ones(tiny_folder):
    error = refused(tiny_folder.parent / "tiny-lama")
    assert "does not exist" in error.message
    assert "tiny-llama" in error.remedy
    assert "nor does the folder" in refused("/no/such/folder/model.gguf").message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "no config.json"),
        (["adapter_config.json"], "adapter"),
        (["b.gguf", "a.gguf"], "a.gguf, b.gguf"),
    ],
)
def test_folder_without_a_model(tmp_path, files, expected):
    for file in files:
        (tmp_path / file).touch()
    assert expected in refused(tmp_path).message


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert ".bin file" in refused(tmp_path / "weights.bin").message
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html>")
    error = refused(tmp_path / "page.gguf")
    assert "not a GGUF" in error.title
    assert "Download it again" in error.remedy


@pytest.mark.parametrize("name", ["smollm2", "smolm2-135m-instruct", "what is this?", "a b/c"])
def test_unknown_name_is_answered_at_once(name, monkeypatch):
    monkeypatch.setattr(source_module, "_look_up", lambda *_: pytest.fail("the hub was asked"))
    start = time.perf_counter()
    error = refused(name)
    assert time.perf_counter() - start < 2
    assert repr(name) in error.title
    assert "smollm2-135m-instruct" in error.remedy


def test_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    error = refused("someone/some-model")
    assert time.perf_counter() - start < 3
    assert "cannot be reached" in error.title
    assert "smollm2-135m-instruct" in error.remedy


def test_a_hub_that_never_answers(monkeypatch):
    """A firewall that swallows packets must not hang the notebook."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source_module, "HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        assert "cannot be reached" in refused("someone/some-model").title
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("RepoNotFound", "The model hub has no model"),
        ("GatedRepo", "is gated"),
        ("RevisionNotFound", "has no revision"),
    ],
)
def test_what_the_hub_answers(monkeypatch, header, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread = threading.Thread(target=_answer, args=(server, header), daemon=True)
        thread.start()
        error = refused("someone/some-model", revision="dev")
        thread.join()
    assert expected in error.title
    assert error.remedy


def _answer(server: socket.socket, code: str) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        status = "403 Forbidden" if code == "GatedRepo" else "404 Not Found"
        connection.sendall(
            f"HTTP/1.1 {status}\r\nX-Error-Code: {code}\r\nX-Error-Message: no\r\nContent-Length: 0\r\n"
            "Connection: close\r\n\r\n".encode()
        )


def test_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused("someone/some-model")
    assert "HF_HUB_OFFLINE" in error.message
    assert "Unset HF_HUB_OFFLINE" in error.remedy


def test_cached_hub_model_needs_no_network(tmp_path, tiny_folder, monkeypatch):
    from nbtune.models import describe, load

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc123").symlink_to(tiny_folder)

    source = find("someone/tiny")
    assert (source.kind, source.origin) == ("hub", "someone/tiny")
    assert describe(ModelSpec(name="someone/tiny")).layers == 2
    assert load(ModelSpec(name="someone/tiny")).model.config._name_or_path == "someone/tiny"
    assert "someone/tiny" in refused("someone/tinny").remedy or "HF_HUB_OFFLINE" in refused("someone/tinny").message
