"""A server that imitates the few answers of the Hugging Face hub that we use.

The list of a repository's files with sizes and digests, and files by byte ranges; large
ones after a redirect to another host, which must not see the user's token. It can
misbehave on demand: cut a transfer short, send wrong bytes, refuse.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """One repository, `owner/model`, of the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.asked: list[tuple[str, int]] = []  # file, first byte
        self.cut_after: dict[str, int] = {}  # file: bytes, then the line goes dead
        self.spoil: dict[str, int] = {}  # file: how often its bytes come wrong
        self.ignores_ranges = False
        self.refuses: str | None = None  # an error code for every request
        self.gated_files = False
        self.piece_s = 0.0  # pause between pieces, so that a run can be interrupted
        self.url = ""

    def listing(self) -> dict:
        """What /api/models/owner/model answers."""
        siblings = [self._sibling(path) for path in sorted(self.folder.iterdir())]
        return {"id": "owner/model", "sha": self.commit, "siblings": siblings}

    def _sibling(self, path: Path) -> dict:
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"rfilename": path.name, "size": len(data), "blobId": git}
        if path.suffix == ".safetensors":
            sha = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        listed = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/(.+)/resolve/([0-9a-f]{40})/(.+)", path)
        if self.hub.refuses:
            status = {"GatedRepo": 403, "RepoNotFound": 401}.get(self.hub.refuses, 500)
            self._answer(status, b"", {"X-Error-Code": self.hub.refuses})
        elif listed and listed[1] == "owner/model":
            if listed[2] in (None, "main", self.hub.commit):
                self._answer(200, json.dumps(self.hub.listing()).encode())
            else:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file and file[1] == "owner/model" and file[2] == self.hub.commit:
            self._answer_file(file[3])
        elif path.startswith("/elsewhere/"):
            wrong = "Authorization" in self.headers  # signed links refuse a second key
            self._answer(400, b"") if wrong else self._send_file(path[11:])
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_file(self, name: str) -> None:
        if self.hub.gated_files:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name.endswith(".safetensors"):
            host = self.hub.url.replace("127.0.0.1", "localhost")
            self._answer(302, b"", {"Location": f"{host}/elsewhere/{name}"})
        else:
            self._send_file(name)

    def _send_file(self, name: str) -> None:
        hub, data = self.hub, (self.hub.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = 0 if hub.ignores_ranges or not asked else int(asked[1])
        hub.asked.append((name, int(asked[1]) if asked else 0))
        if hub.spoil.get(name, 0) > 0:
            hub.spoil[name] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}"
            )
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = hub.cut_after.get(name, len(data))
        for at in range(start, max(start, end), 4096):
            self.wfile.write(data[at : min(at + 4096, end)])
            time.sleep(hub.piece_s)
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no fault here."""


@contextmanager
def serving(folder: Path) -> Iterator[FakeHub]:
    """Serve a folder as owner/model until the block ends."""
    hub = FakeHub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
