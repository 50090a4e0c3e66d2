"""A stand-in for the hub on this machine: takes what `huggingface_hub` uploads, and keeps it in memory.

Run as a program it trains and pushes to the hub at ``HF_ENDPOINT``, which `huggingface_hub` reads when it is imported.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub(ThreadingHTTPServer):
    """Holds the files of every commit, and the messages."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self._answer({"url": f"{self.server.url}/me/run", "id": "me/run"})
        elif "/preupload/" in self.path:
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            # "regular" files travel inside the commit.
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._refuse()

    def do_GET(self) -> None:
        if re.fullmatch(r"/api/(models/me/run|whoami-v2)(/.*)?", self.path.split("?")[0]):
            self._answer({"id": "me/run", "sha": "0" * 40, "siblings": [], "name": "me", "type": "user"})
        else:
            self._refuse()

    def do_HEAD(self) -> None:
        self._refuse()

    def _commit(self, body: bytes) -> None:
        with self.server.lock:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        number = f"{len(self.server.messages):040x}"
        url = f"{self.server.url}/me/run/commit/{number}"
        self._answer({"commitUrl": url, "commitOid": number, "hookOutput": "", "success": True})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._answer({"error": "Entry not found"}, 404)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def main(folder: Path) -> None:
    from dcp_plugins.transformers import DCPCallback
    from tests.adapters.transformers.trainers import fit

    fit(
        folder,
        DCPCallback(asynchronous="thread"),
        max_steps=4,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_token="hf_none",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        save_total_limit=1,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
