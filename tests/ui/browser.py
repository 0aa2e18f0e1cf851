"""A real JupyterLab, a real browser and the kernel between them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}  # JupyterLab's question about news would cover the page


def why_no_browser() -> str:
    """What is missing for tests in a browser; empty if nothing is."""
    missing = [name for name in ("playwright", "jupyterlab", "ipywidgets") if find_spec(name) is None]
    missing += [] if CHROMIUM else ["Chromium"]
    return f"{', '.join(missing)} not installed" if missing else ""


class Lab:
    """JupyterLab serving `folder`; a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._own = folder / ".jupyter"
        news = self._own / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text(json.dumps(NO_NEWS))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self) -> Lab:
        own = {
            "JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython",
        }  # fmt: skip
        environment = os.environ | {name: str(self._own / folder) for name, folder in own.items()}
        environment.pop("MPLBACKEND", None)
        command = [
            sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={self.port}",
            "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
            f"--ServerApp.root_dir={self.folder}",
        ]  # fmt: skip
        self._log = (self.folder / "lab.log").open("w")
        self._server = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 60
        while True:
            try:
                self.get("/api")
                return self
            except OSError:
                assert self._server.poll() is None and time.monotonic() < end, (self.folder / "lab.log").read_text()
                time.sleep(0.2)

    def get(self, path: str) -> Any:
        """The server's answer to a request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def address(self, notebook: str) -> str:
        """Where a notebook is opened, with a workspace of its own."""
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?reset"

    def kernel(self) -> Kernel:
        """A second client of the only kernel that runs."""
        (running,) = self.get("/api/kernels")
        return Kernel(self._own / "runtime" / f"kernel-{running['id']}.json")

    def __exit__(self, *problem: object) -> None:
        self._server.terminate()
        try:
            self._server.wait(15)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()


class Kernel:
    """Asks a running kernel for values, as another cell would."""

    def __init__(self, connection_file: Path):
        from jupyter_client import BlockingKernelClient

        self._client = BlockingKernelClient(connection_file=str(connection_file))
        self._client.load_connection_file()
        self._client.start_channels()

    def ask(self, expression: str, timeout: float = 60.0) -> Any:
        """The value of a Python expression whose `repr` is a literal."""
        asked = self._client.execute("", user_expressions={"value": expression}, store_history=False)
        while True:
            reply = self._client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == asked:
                break
        value = reply["content"]["user_expressions"]["value"]
        assert value["status"] == "ok", value
        return ast.literal_eval(value["data"]["text/plain"])

    def seconds(self, expression: str = "1 + 1") -> float:
        """How long an answer takes."""
        began = time.monotonic()
        self.ask(expression)
        return time.monotonic() - began

    def close(self) -> None:
        self._client.stop_channels()


class Notebook:
    """A page with a notebook in JupyterLab."""

    def __init__(self, page: Any, lab: Lab, name: str):
        self.page = page
        page.goto(lab.address(name))
        # the notebook's own indicator says idle even before there is a kernel, and what is run then is lost
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=120_000)
        page.keyboard.press("Control+b")  # the file browser away: room for the notebook

    def run_all(self, timeout: float) -> None:
        """Run ▸ Run All Cells, and wait until every cell has run or one has failed."""
        page = self.page
        prompts = "Array.from(document.querySelectorAll('.jp-CodeCell .jp-InputPrompt'), e => e.textContent)"
        before = page.evaluate(f"{prompts}.join()")
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        # a short cell may have run before its star is seen; then its number is
        page.wait_for_function(f"before => {prompts}.join() != before", arg=before, timeout=30_000)
        failed = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
        page.wait_for_function(f"{failed} || !{prompts}.some(t => t.includes('*'))", timeout=timeout * 1000)
        problem = page.evaluate(f"(e => e ? e.textContent : '')({failed})")
        assert not problem, problem

    def text(self, selector: str, nth: int = 0) -> str:
        """What is written in a part of the page."""
        return self.page.locator(selector).nth(nth).inner_text()

    def wait_text(self, selector: str, words: str, *, nth: int = 0, timeout: float = 60.0) -> float:
        """Wait until a part of the page contains `words`; seconds it took."""
        began = time.monotonic()
        while words not in self.text(selector, nth):
            seen = self.text(selector, nth)
            assert time.monotonic() - began < timeout, f"{selector} says {seen!r}, not {words!r}"
            time.sleep(0.02)
        return time.monotonic() - began
