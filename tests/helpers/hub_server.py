"""A Hugging Face Hub on loopback: as much of its API as huggingface_hub uses to make repositories, commit, list and download."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
_STAMP = "2026-01-01T00:00:00.000Z"
_LARGE = (".safetensors", ".parquet", ".tar")


@dataclass
class Repo:
    """Files by commit; `main` and every commit can be asked for."""

    kind: str
    name: str
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        """A new commit with these files; returns its name."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((digest, files))
        self.messages.append(message)
        return digest


class Hub:
    """The state: repositories, large files by content, and what was asked and sent. `broken` answers 500 to a path that holds it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent: list[str] = []  # large files that were uploaded, by name of their content
        self.tokens: set[str | None] = set()
        self.broken: str | None = None
        self.address = ""
        self.lock = threading.RLock()

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> str:
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        return repo.commit(files)

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    # answers: status, headers, content

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if path.startswith("/lfs/"):
            self.large[path[5:]] = body
            self.sent.append(path[5:])
            return 200, {}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path in ("/api/validate-yaml", "/api/whoami-v2"):
            return 200, {}, {"errors": [], "warnings": [], "name": "someone", "type": "user", "orgs": []}
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {}, self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, name, action, revision, rest = found.groups()
            return self._api(kind, name, action or "revision", unquote(revision or "main"), rest or "", body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if found[1] else "model"
            return self._file(kind, found[2], unquote(found[3]), unquote(found[4]))
        return 404, {}, {"error": "not known"}

    def _create(self, given: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        name, kind = f"{given['organization']}/{given['name']}", given.get("type") or "model"
        url = {"url": f"{self.address}/{name}", "id": name, "name": name}
        if (kind, name) in self.repos:
            return 409, {}, {"error": "You already created this model repo", **url}
        hidden = bool(given.get("private")) or given.get("visibility") == "private"
        self.repos[kind, name] = Repo(kind, name, hidden)
        return 200, {}, url

    def _batch(self, given: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for one in given["objects"]:
            actions = {"actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}", "header": {}}}}
            objects.append({**one, **({} if one["oid"] in self.large else actions)})
        return {"transfer": "basic", "objects": objects}

    def _api(
        self, kind: str, name: str, action: str, revision: str, rest: str, body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        repo = self.repos.get((kind, name))
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        found = repo.at(revision)
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        sha, files = found
        if action == "revision":
            siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
            info = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings}
            return 200, {}, {**info, "lastModified": _STAMP, "tags": [], "downloads": 0, "author": name.split("/")[0]}
        if action == "tree":
            inside = [path for path in sorted(files) if not rest or path == rest or path.startswith(f"{rest}/")]
            return 200, {}, [*_folders(inside), *(_entry(path, files[path]) for path in inside)]
        if action == "paths-info":
            return 200, {}, self._paths_info(files, body)
        if action == "preupload":
            wanted = json.loads(body)["files"]
            modes = [(one["path"], "lfs" if one["path"].endswith(_LARGE) else "regular") for one in wanted]
            return 200, {}, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        if action == "commit":
            return 200, {}, self._commit(repo, files, body)
        return 404, {}, {"error": f"{action} is not known"}

    @staticmethod
    def _paths_info(files: dict[str, bytes], body: bytes) -> list[dict[str, Any]]:
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = [
                unquote(part[6:].replace("+", " ")) for part in body.decode().split("&") if part.startswith("paths=")
            ]
        found = [_entry(path, files[path]) for path in wanted if path in files]
        folders = {folder["path"]: folder for folder in _folders(list(files))}
        return [*found, *(folders[path] for path in wanted if path in folders)]

    def _commit(self, repo: Repo, files: dict[str, bytes], body: bytes) -> dict[str, Any]:
        files, message = dict(files), ""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, message)
        url = f"{self.address}/{repo.name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def _file(self, kind: str, name: str, revision: str, path: str) -> tuple[int, dict[str, str], Any]:
        repo = self.repos.get((kind, name))
        found = repo.at(revision) if repo else None
        if found is None:
            code = "RepoNotFound" if repo is None else "RevisionNotFound"
            return 404, {"X-Error-Code": code}, {"error": code}
        if path not in found[1]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]}, {"error": "Entry not found"}
        content = found[1][path]
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found[0]}
        return 200, {**tag, "Accept-Ranges": "bytes"}, content


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def _folders(paths: list[str]) -> list[dict[str, Any]]:
    names = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
    return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(names)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _do(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        body = self._body()
        with hub.lock:
            hub.asked.append((self.command, path))
            hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer ") or None)
            if hub.broken is not None and hub.broken in path:
                self._send(400, {}, {"error": "out of order"})
                return
            self._send(*hub.answer(self.command, path, body))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _do

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict[str, str], answer: Any) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and status == 200 and isinstance(answer, bytes):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        return


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A fresh Hub, until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    hub.address = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        http.shutdown()
        http.server_close()


@contextlib.contextmanager
def connected(home: Any) -> Iterator[Hub]:
    """A fresh Hub that huggingface_hub of this process talks to, logged in, with its cache in `home`."""
    import huggingface_hub
    import pytest
    from huggingface_hub import constants

    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        try:
            yield hub
        finally:
            huggingface_hub.HfFileSystem.clear_instance_cache()
