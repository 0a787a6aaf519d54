"""A small server on 127.0.0.1 with the calls that huggingface_hub needs to fetch and push a model."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the repository `user/repo`, and records pushes.

    Attributes:
        asked: method and path of every request.
        pushed: name -> content of the files of the last commit.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked, self.pushed = folder, [], {}  # type: ignore[var-annotated]

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, Content_Type="application/json")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        folder = self.server.folder
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        known = [f"/api/models/user/repo/revision/{name}" for name in ("main", "v1", COMMIT)]
        if path in known:
            self._json({"id": "user/repo", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith("/api/models/user/repo/tree/"):
            sizes = [(name, (folder / name).stat().st_size) for name in files]
            self._json([{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes])
        elif path.startswith(f"/user/repo/resolve/{COMMIT}/"):
            body = (folder / path.split(f"{COMMIT}/")[1]).read_bytes()
            etag = hashlib.sha1(body).hexdigest()
            self._send(body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self._send(b"{}", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            self._json({"url": f"{self.server.url}/user/repo", "name": "user/repo"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.pushed = {file["path"]: base64.b64decode(file["content"]) for file in files}
            address = f"{self.server.url}/user/repo/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})
        else:
            self._json({"error": f"unexpected: {path}"}, 404)


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Runs the server."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
