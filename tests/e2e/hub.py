"""A Hugging Face hub on the loopback interface: as much of its HTTP API as downloads need."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
_INFO = re.compile(rf"/api/models/{_NAME}(/revision/(?P<revision>[^/]+))?$")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)")
_FILE = re.compile(rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")


@dataclass
class Hub:
    """Directories by repository and revision; a context manager that serves them."""

    commits: dict[tuple[str, str], Path] = field(default_factory=dict)

    def add(self, repo: str, directory: Path, revision: str = "main") -> str:
        """Publish ``directory`` at a branch; returns the commit."""
        commit = sha1(f"{repo} {directory}".encode()).hexdigest()
        self.commits[repo, revision] = self.commits[repo, commit] = directory
        return commit

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _FILE.match(path):
            self._file(found)
        elif found := _TREE.match(path) or _INFO.match(path):
            self._listing(found, tree="/tree/" in path)
        else:
            self._answer(404, b"", {})

    do_HEAD = do_GET  # noqa: N815 the name that http.server calls

    def _directory(self, found: re.Match) -> tuple[Path, str] | None:
        repo, revision = found["repo"], found["revision"] or "main"
        directory = self.hub.commits.get((repo, revision))
        if directory is None:
            known = any(name == repo for name, _ in self.hub.commits)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._answer(404, b"{}", {"X-Error-Code": code})
            return None
        return directory, sha1(f"{repo} {directory}".encode()).hexdigest()

    def _file(self, found: re.Match) -> None:
        if (at := self._directory(found)) is None:
            return
        directory, commit = at
        path = directory / found["file"]
        headers = {"X-Repo-Commit": commit}
        if path.is_file():
            content = path.read_bytes()
            self._answer(200, content, {**headers, "ETag": f'"{sha1(content).hexdigest()}"'})
        else:
            self._answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})

    def _listing(self, found: re.Match, tree: bool) -> None:
        if (at := self._directory(found)) is None:
            return
        directory, commit = at
        files = [path for path in sorted(directory.iterdir()) if path.is_file()]
        if tree:
            listing: object = [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        else:
            siblings = [{"rfilename": path.name} for path in files]
            listing = {"id": found["repo"], "sha": commit, "siblings": siblings}
        self._answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
