"""JupyterLab driven by the system's Chromium: a server of its own, and a page that runs cells and takes pictures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import nbformat

TOKEN = "nbtune-tests"
KERNEL_SECONDS = 90  # two cores that others use too


class Lab:
    """A JupyterLab server over `folder`, with settings and workspaces of its own."""

    def __init__(self, folder: Path, theme: str = "JupyterLab Light", python_path: tuple[Path, ...] = ()) -> None:
        self.folder = folder
        self.port = _free_port()
        settings = folder / ".lab" / "settings"
        _write_settings(settings, "apputils-extension/themes", {"theme": theme})
        _write_settings(settings, "apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
        self.environment = os.environ | {
            "JUPYTER_CONFIG_DIR": str(folder / ".lab" / "config"),
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".lab" / "workspaces"),
            "PYTHONPATH": os.pathsep.join([*map(str, python_path), os.environ.get("PYTHONPATH", "")]),
        }
        self._log = (folder / ".lab" / "server.log").open("w")
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        options = [f"--port={self.port}", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
        self._server = subprocess.Popen(
            [*command, *options], stdout=self._log, stderr=self._log, env=self.environment, cwd=folder
        )
        self._await_server()

    @property
    def log(self) -> str:
        return (self.folder / ".lab" / "server.log").read_text()

    def url(self, notebook: str) -> str:
        """A fresh workspace each time: an old one restores earlier tabs, which hide the cell."""
        return f"http://127.0.0.1:{self.port}/lab/workspaces/w{time.monotonic_ns()}/tree/{notebook}?token={TOKEN}"

    def write(self, name: str, *cells: str) -> None:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / name)

    def get(self, what: str) -> Any:
        """An answer of the server's REST API."""
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/{what}?token={TOKEN}", timeout=10))

    def delete_kernels(self) -> None:
        """Shut every kernel down, as the menu does."""
        for session in self.get("sessions"):
            url = f"http://127.0.0.1:{self.port}/api/sessions/{session['id']}?token={TOKEN}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=20)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait(20)
        self._log.close()

    def _await_server(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={TOKEN}", timeout=2)
                return
            except OSError:
                if self._server.poll() is not None:
                    break
                time.sleep(0.3)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log}")


class Notebook:
    """One notebook open in a page."""

    def __init__(self, lab: Lab, browser: Any, name: str, width: int = 1280, height: int = 1000) -> None:
        self.lab, self.name = lab, name
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.goto(lab.url(name))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self._await_kernel()
        if self.page.locator(".jp-DirListing").is_visible():
            self.page.keyboard.press("Control+b")  # the file browser takes the width of the cell

    def run(self, index: int) -> None:
        """Execute one cell and return as soon as it is under way. A key that comes while Lab settles is lost: again."""
        before = self._prompt(index)
        for _ in range(5):
            self.cell(index).locator(".jp-InputArea-editor").click()
            self.page.keyboard.press("Control+Enter")
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                if self._prompt(index) != before:
                    return
                self.page.wait_for_timeout(50)
        raise RuntimeError(f"cell {index} did not start")

    def _prompt(self, index: int) -> str:
        return self.cell(index).locator(".jp-InputPrompt").first.inner_text()

    def run_to_end(self, index: int, seconds: float = 60) -> None:
        self.run(index)
        self.await_prompt(index, seconds)

    def await_prompt(self, index: int, seconds: float = 60) -> None:
        """Wait until the cell shows a number instead of a star: it has ended."""
        prompt = "document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelector('.jp-InputPrompt').textContent"
        script = f"i => /\\[\\d+\\]/.test({prompt})"
        self.page.wait_for_function(script, arg=index, timeout=seconds * 1000)

    def cell(self, index: int) -> Any:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def text(self, index: int) -> str:
        return self.cell(index).locator(".jp-OutputArea").first.inner_text()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def save(self) -> dict[str, Any]:
        """Save with the keyboard and read the file."""
        path = self.lab.folder / self.name
        before = path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + 20
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            self.page.wait_for_timeout(100)
        while True:  # Jupyter empties the file before it writes
            try:
                return json.loads(path.read_text())
            except json.JSONDecodeError:
                if time.monotonic() > deadline:
                    raise
                self.page.wait_for_timeout(100)

    def shot(self, path: str | Path) -> None:
        self.page.screenshot(path=str(path))

    def close(self) -> None:
        self.page.close()

    def _await_kernel(self) -> None:
        """Until the server has a kernel for this notebook that is idle and that the page is connected to.

        The page's own indicator says idle before there is a kernel, and a cell that is run then is dropped.
        """
        deadline = time.monotonic() + KERNEL_SECONDS
        while time.monotonic() < deadline:
            sessions = [session["kernel"] for session in self.lab.get("sessions") if session["path"] == self.name]
            if any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in sessions):
                self.page.wait_for_timeout(500)
                return
            self.page.wait_for_timeout(250)
        raise RuntimeError(f"no kernel after {KERNEL_SECONDS} s:\n{self.lab.log[-2000:]}")


def _write_settings(folder: Path, plugin: str, values: dict[str, Any]) -> None:
    path = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
