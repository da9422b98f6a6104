"""Pushing an export: against a small server that speaks what huggingface_hub asks of the hub."""

from __future__ import annotations

import base64
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import nbtune as nt
from nbtune.cli import app
from nbtune.errors import ExportError
from nbtune.export import folders

Folder = Callable[[str], Path]
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `files` are those of commits, by repository and name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.forbidden = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        name = self.path.removeprefix("/api/models/")
        if name in self.server.private:
            self.answer(200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": files})
        else:
            self.commit(path, body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if self.server.forbidden:
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
        self.answer(200, {"url": f"{self.server.address}/{name}"})

    def commit(self, path: str, body: bytes) -> None:
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.server.files[name] = {file: base64.b64decode(content) for file, content in files.items()}
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def answer(self, status: int, content: dict[str, Any], code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_folder_is_pushed(hub: Hub, adapters: Folder, tmp_path: Path) -> None:
    done = nt.export(adapters("llama"), "merged", tmp_path / "out", push_to="ada/my-model")
    assert done.pushed_to == f"{hub.address}/ada/my-model"
    assert json.loads(done.report.read_text())["pushed_to"] == done.pushed_to
    assert hub.private == {"ada/my-model": True}
    pushed = hub.files["ada/my-model"]
    assert set(pushed) == {path.name for path in done.path.iterdir()}
    assert pushed["model.safetensors"] == (done.path / "model.safetensors").read_bytes()
    assert json.loads(pushed["export.json"])["proved"] is True
    assert str(tmp_path).encode() not in b"".join(pushed.values())


def test_a_file_is_pushed_with_a_card_by_the_command(hub: Hub, adapters: Folder, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    arguments = ["export", str(adapters("llama")), "gguf", str(out), "--push-to", "ada/my-gguf", "--public"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"pushed to {hub.address}/ada/my-gguf" in result.output
    assert hub.private == {"ada/my-gguf": False}
    pushed = hub.files["ada/my-gguf"]
    assert set(pushed) == {"README.md", "model.gguf", "model.export.json"}
    assert pushed["model.gguf"] == out.read_bytes()
    assert b"library_name: llama.cpp" in pushed["README.md"]
    assert b"llama_cpp" in pushed["README.md"]


def unpushed(adapters: Folder, out: Path, why: str, name: str = "ada/my-model") -> str:
    """The remedy of an export that is whole but did not get to the hub."""
    with pytest.raises(ExportError, match=f"was not pushed to the hub\n.*{why}") as caught:
        nt.export(adapters("llama"), "adapter", out, push_to=name)
    assert f"whole and proved: {out}" in caught.value.message
    report = json.loads((out / "export.json").read_text())
    assert (report["proved"], report["pushed_to"]) == (True, None)
    return caught.value.remedy


def test_a_name_that_is_taken(hub: Hub, adapters: Folder, tmp_path: Path) -> None:
    hub.private["ada/my-model"] = False
    remedy = unpushed(adapters, tmp_path / "out", "ada/my-model exists already")
    assert remedy == f"Choose another name. Then: hf upload ada/my-model-2 {tmp_path / 'out'} . --private"
    assert hub.files == {}


def test_a_hub_that_refuses(hub: Hub, adapters: Folder, tmp_path: Path) -> None:
    hub.forbidden = True
    remedy = unpushed(adapters, tmp_path / "my out", "The hub answered 403: You don't have the rights")
    command = remedy.partition("Then: ")[2]
    assert shlex.split(command) == ["hf", "upload", "ada/my-model", str(tmp_path / "my out"), ".", "--private"]


def test_no_token(hub: Hub, adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "Run `hf auth login`." in unpushed(adapters, tmp_path / "out", "There is no token")
    assert hub.asked == []


def test_offline(hub: Hub, adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    adapters("llama")
    start = time.perf_counter()
    unpushed(adapters, tmp_path / "out", "The hub cannot be reached: Connect")
    assert time.perf_counter() - start < 15  # no minutes of retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Unset HF_HUB_OFFLINE" in unpushed(adapters, tmp_path / "again", "HF_HUB_OFFLINE is set")


def test_nothing_is_uploaded_without_a_proof(
    hub: Hub, adapters: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_another(folder: Path, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[:] = 0
        return model

    monkeypatch.setattr(folders, "read_merged", read_another)
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        nt.export(adapters("llama"), "merged", tmp_path / "out", push_to="ada/my-model")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["my-model", "ada/my model", "ada/b/c", "../etc/passwd"])
def test_a_wrong_name_is_refused_before_anything_is_written(name: str, adapters: Folder, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no name of a repository"):
        nt.export(adapters("llama"), "adapter", tmp_path / "out", push_to=name)
    assert not (tmp_path / "out").exists()
