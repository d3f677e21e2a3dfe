"""A small server that speaks the hub's protocol on loopback, for the hub's real clients.

It serves folders as repositories: listings, files behind redirects with ETags and ranges, and
uploads. Faults can be injected per path: a status, or a connection that drops after some bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(.*))?")


class Hub:
    """Use as a context manager; `url` is for HF_ENDPOINT."""

    def __init__(self, models: dict[str, Path] | None = None, data: dict[str, Path] | None = None):
        self.repositories = {"models": models or {}, "datasets": data or {}}
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.uploaded: dict[str, bytes] = {}  # by path in the repository
        self.token: str | None = None  # if set, every request needs it
        # Called with method and path; returns a status to answer with, or None.
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.drop_after: dict[str, int] = {}  # end of a path: bytes of its first answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.content_url = self.url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a program that uses this hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        } | ({"HF_TOKEN": self.token} if self.token else {})


def etag(file: Path) -> str:
    """The sha256 of a file, as the hub tags large files."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def handle_request(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        # Always read, or the next request on this connection would begin with it.
        self.content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        path = unquote(url.path)
        hub.requests.append((self.command, path, dict(self.headers)))
        if status := hub.fault(self.command, path):
            return self.answer(status, {"error": f"injected {status}"}, {"Retry-After": "0"})
        if (
            hub.token
            and not path.startswith(("/cdn/", "/lfs/"))
            and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
            error = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, {"error": "Unauthorized"}, error)
        if found := FILE.fullmatch(path):
            kind = "datasets" if found[1] else "models"
            return self.send_file(kind, found[2], found[4], path)
        if path.startswith("/cdn/"):
            _, _, kind, owner, name, inside = path.split("/", 5)
            return self.send_content(self.hub.repositories[kind][f"{owner}/{name}"] / inside, path)
        if found := API.fullmatch(path):
            return self.api(found[1], found[2], found[3] or "", parse_qs(url.query))
        if path == "/api/repos/create":
            asked = json.loads(self.content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            return self.answer(200, {"url": f"{hub.url}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "auth": {}, "orgs": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch(json.loads(self.content))
        if path.startswith("/lfs/"):
            hub.uploaded[path] = self.content
            return self.answer(200, {})
        return self.answer(404, {"error": "Not found"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- files

    def send_file(self, kind: str, repository: str, name: str, path: str) -> None:
        folder = self.hub.repositories[kind].get(repository)
        if folder is None:
            return self.missing("RepoNotFound", 401)  # the hub does not tell missing from private
        if not (folder / name).is_file():
            return self.missing("EntryNotFound", 404)
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{etag(folder / name)}"',
            "X-Linked-Size": str((folder / name).stat().st_size),
            "ETag": '"of the pointer"',
            # Another host, as on the hub: the client must not send it the token.
            "Location": f"{self.hub.content_url}/cdn/{kind}/{repository}/{name}",
        }
        return self.answer(302, {}, headers)

    def missing(self, code: str, status: int) -> None:
        self.answer(status, {"error": "Not found"}, {"X-Error-Code": code, "X-Error-Message": code})

    def send_content(self, file: Path, path: str) -> None:
        content, status = file.read_bytes(), 200
        size, asked = len(content), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or size - 1)
            content, status = content[first : last + 1], 206
        self.send_response(status)
        self.send_header("ETag", f'"{etag(file)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header(
                "Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{size}"
            )
        self.end_headers()
        if self.command == "HEAD":
            return
        for end in [end for end in self.hub.drop_after if path.endswith(end)]:
            content = content[: self.hub.drop_after.pop(end)]
            self.close_connection = True
        self.wfile.write(content)

    # --- listings and commits

    def api(self, kind: str, repository: str, rest: str, query: dict[str, list[str]]) -> None:
        folder = self.hub.repositories[kind].get(repository)
        verb, _, argument = rest.partition("/")
        if verb == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 10_000 else "regular",
                 "shouldIgnore": False}
                for f in json.loads(self.content)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if verb == "commit":
            return self.commit(repository)
        if folder is None:
            return self.missing("RepoNotFound", 401)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        entries: list[dict[str, Any]] = [
            {"type": "file", "path": f.relative_to(folder).as_posix(), "size": f.stat().st_size,
             "oid": etag(f)[:40], "lfs": {"oid": etag(f), "size": f.stat().st_size, "pointerSize": 1}}
            for f in files
        ]  # fmt: skip
        folders = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        if verb == "tree":
            below = argument.partition("/")[2]
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            here = [e for e in entries if not below or e["path"].startswith(below + "/")]
            if not deep:
                here = [e for e in here if "/" not in e["path"][len(below) :].strip("/")]
            return self.answer(200, here) if here else self.missing("EntryNotFound", 404)
        if verb == "paths-info":
            body = self.content
            wanted = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else parse_qs(body.decode())["paths"]
            )
            return self.answer(200, [e for e in entries if e["path"] in wanted])
        if verb == "refs":
            return self.answer(200, {"branches": [], "converts": [], "tags": []})
        siblings = [
            {
                "rfilename": e["path"],
                "size": e["size"],
                "blobId": e["oid"],
                "lfs": e["lfs"] | {"sha256": e["lfs"]["oid"]},
            }
            for e in entries
            if e["type"] == "file"
        ]
        about = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        return self.answer(200, about | {"tags": [], "disabled": False, "gated": False})

    def lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: str) -> None:
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.uploaded[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.uploaded[value["path"]] = self.hub.uploaded.pop(f"/lfs/{value['oid']}")
        url = f"{self.hub.url}/{repository}/commit/{COMMIT}"
        self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
