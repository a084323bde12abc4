"""A Weights & Biases server on loopback: as much of its GraphQL, file stream and storage as wandb uses for runs, artifacts,
alerts and sweeps."""

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

STAMP = "2026-01-01T00:00:00Z"
KEY = "0123456789" * 4


@dataclass
class Run:
    """What the server knows of one run."""

    entity: str
    project: str
    id: str
    said: dict[str, Any] = field(default_factory=dict)  # the last value of each argument of UpsertBucket
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # of files that are streamed, line by line number
    exit_code: int | None = None
    alerts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.streams.get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.streams.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        held = json.loads(self.said.get("config") or "{}")
        return {key: value["value"] for key, value in held.items() if isinstance(value, dict) and "value" in value}


@dataclass
class Artifact:
    """One version of an artifact."""

    id: str
    entity: str
    project: str
    collection: str
    type: str
    version: int
    aliases: list[str]
    digest: str
    run: str
    metadata: dict[str, Any]
    manifest: str = ""  # the key of its manifest in the storage
    committed: bool = False


class Server:
    """The state; `runs` by id, `artifacts` by order, `storage` by path, `asked` the names of all queries."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.storage: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.points: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self.address = ""

    # runs

    def run(self, entity: str | None, project: str | None, name: str) -> Run:
        return self.runs.setdefault(name, Run(entity or "someone", project or "uncategorized", name))

    def upsert_bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or f"made{len(self.runs)}"
        inserted = name not in self.runs
        run = self.run(given.get("entity"), given.get("project"), name)
        run.said |= {key: value for key, value in given.items() if value is not None}
        bucket = self._bucket(run)
        bucket |= {"project": self._project(run), "sweepName": run.said.get("sweep"), "description": ""}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        place = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": given.get("entity")}}
        return {"model": {**place, "bucket": None if run is None else self._bucket(run)}}

    def _bucket(self, run: Run) -> dict[str, Any]:
        lines = {name: run.streams.get(f"wandb-{name}.jsonl", {}) for name in ("history", "events")}
        tails = {name: json.dumps([held[max(held)]] if held else []) for name, held in lines.items()}
        return {
            "id": f"id-{run.id}",
            "name": run.id,
            "displayName": run.said.get("displayName"),
            "config": run.said.get("config", "{}"),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(lines["history"]),
            "eventsLineCount": len(lines["events"]),
            "logLineCount": len(run.streams.get("output.log", {})),
            "historyTail": tails["history"],
            "eventsTail": tails["events"],
            "tags": run.said.get("tags", []),
            "notes": run.said.get("notes"),
            "wandbConfig": "{}",
        }

    @staticmethod
    def _project(run: Run) -> dict[str, Any]:
        return {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}

    def stream(self, entity: str, project: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.run(entity, project, name)
        for file, part in (body.get("files") or {}).items():
            lines = run.streams.setdefault(file, {})
            for number, line in enumerate(part["content"], part.get("offset", 0)):
                lines[number] = line
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {}

    # artifacts

    def create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        given = given["input"]
        names = given.get("artifactCollectionNames") or [given.get("artifactCollectionName")]
        before = [one for one in self.artifacts if one.collection == names[0]]
        made = Artifact(
            f"artifact{len(self.artifacts)}",
            given["entityName"],
            given["projectName"],
            names[0],
            given["artifactTypeName"],
            len(before),
            [each["alias"] for each in given.get("aliases") or []],
            given["digest"],
            given.get("runName") or "",
            json.loads(given.get("metadata") or "{}"),
        )
        for one in before:
            one.aliases = [alias for alias in one.aliases if alias not in made.aliases]
        self.artifacts.append(made)
        latest = {"id": before[-1].id} if before else None
        return {
            "createArtifact": {
                "artifact": {"id": made.id, "state": "PENDING", "artifactSequence": {"latestArtifact": latest}}
            }
        }

    def create_manifest(self, given: dict[str, Any], name: str) -> dict[str, Any]:
        number = given.get("artifactID") or given.get("artifactManifestID", "").removeprefix("manifest-")
        artifact = self._artifact(number)
        artifact.manifest = f"manifest/{artifact.id}"
        file = {"id": "f", "uploadUrl": self._url(artifact.manifest), "uploadHeaders": []}
        return {name: {"artifactManifest": {"id": f"manifest-{artifact.id}", "file": file}}}

    def create_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in given["input"]["artifactFiles"]:
            path = f"artifacts/{spec['artifactID']}/{spec['name']}"
            node = {"storagePath": path, "uploadUrl": self._url(path), "uploadHeaders": []}
            edges.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def commit_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _artifact(self, number: str) -> Artifact:
        return next(one for one in self.artifacts if one.id == number)

    def membership(self, given: dict[str, Any]) -> dict[str, Any]:
        collection, _, alias = given["name"].partition(":")
        found = self._find(collection, alias or "latest")
        member = None if found is None else self._membership(found)
        return {"project": {"artifactCollectionMembership": member}}

    def _find(self, collection: str, alias: str) -> Artifact | None:
        versions = [one for one in self.artifacts if one.collection == collection]
        return next((one for one in reversed(versions) if alias in (*one.aliases, f"v{one.version}")), None)

    def _membership(self, found: Artifact) -> dict[str, Any]:
        project = {"id": "p", "internalId": "1", "name": found.project, "entity": {"name": found.entity}}
        sequence = {"__typename": "ArtifactSequence", "name": found.collection, "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in found.aliases]
        artifact = {
            "__typename": "Artifact",
            "id": found.id,
            "artifactSequence": sequence,
            "versionIndex": found.version,
            "artifactType": {"name": found.type},
            "description": None,
            "metadata": json.dumps(found.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": found.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": found.id,
            "fileCount": len(self.contents(found)),
            "createdAt": STAMP,
            "updatedAt": STAMP,
        }
        member = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": found.version}
        return {**member, "createdAt": STAMP, "aliases": aliases, "artifactCollection": sequence, "artifact": artifact}

    def contents(self, artifact: Artifact) -> dict[str, dict[str, Any]]:
        return json.loads(self.storage[artifact.manifest])["contents"]

    def manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = self._url(self._artifact(given["id"]).manifest)
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def file_urls(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self._find(given["collection"], given["alias"])
        assert found is not None
        wanted = given.get("fileNames")
        edges = []
        for name, entry in self.contents(found).items():
            if wanted and name not in wanted:
                continue
            url = entry.get("ref") or self._url(f"artifacts/{entry.get('birthArtifactID') or found.id}/{name}")
            node = {"__typename": "File", "id": name, "name": name, "directUrl": url, "url": url}
            node |= {"sizeBytes": entry.get("size", 0), "storagePath": name, "mimetype": "", "updatedAt": STAMP}
            edges.append({"node": {**node, "digest": entry["digest"], "md5": entry["digest"]}})
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        files = {"pageInfo": page, "edges": edges, "totalCount": len(edges)}
        held = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": held}}

    def _url(self, path: str) -> str:
        return f"{self.address}/storage/{path}"

    # everything by the name of the query

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The data of the answer; None for a query that this server does not know."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query[:60]
        self.asked.append(name)
        viewer = {"id": "u", "entity": "someone", "username": "someone", "email": "", "flags": "{}", "admin": False}
        viewer |= {"teams": {"edges": [{"node": {"name": "team"}}]}, "apiKeys": {"edges": []}}
        answers: dict[str, Any] = {
            "Viewer": lambda: {"viewer": viewer},
            "GetDefaultEntity": lambda: {"viewer": viewer},
            "ServerFeaturesQuery": lambda: {"serverInfo": {"features": []}},
            "UpsertBucket": lambda: self.upsert_bucket(given),
            "RunResumeStatus": lambda: self.resume_status(given),
            "CreateRunFiles": lambda: self._run_files(given),
            "NotifyScriptableRunAlert": lambda: self._alert(given),
            "CreateArtifact": lambda: self.create_artifact(given),
            "CreateArtifactManifest": lambda: self.create_manifest(given, "createArtifactManifest"),
            "UpdateArtifactManifest": lambda: self.create_manifest(given, "updateArtifactManifest"),
            "CreateArtifactFiles": lambda: self.create_files(given),
            "CommitArtifact": lambda: self.commit_artifact(given),
            "UpsertSweep": lambda: self._sweep(given),
            "SweepWithRuns": lambda: self._sweep_of(given),
            "CreateAgent": lambda: {"createAgent": {"agent": {"id": given["sweep"]}}},
            "Heartbeat": lambda: self._heartbeat(given),
            "UseArtifact": lambda: {"useArtifact": {"artifact": {"id": given["input"]["artifactID"]}}},
            "ArtifactMembershipByName": lambda: self.membership(given),
            "FetchArtifactManifest": lambda: self.manifest(given),
            "ArtifactMembershipFiles": lambda: self.file_urls(given),
            "GetArtifactMembershipFileUrls": lambda: self.file_urls(given),
        }
        with self.lock:
            if name in answers:
                return answers[name]()
            self.unknown.append(query)
            return None

    def _run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        urls = [{"name": name, "uploadUrl": self._url(f"runs/{given['run']}/{name}")} for name in given["files"] or ()]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}

    # sweeps: `points` are what the agent gets, one run each

    def _sweep(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = {"config": given["config"], "left": list(self.points), "sent": []}
        place = {
            "id": "p",
            "name": given["projectName"],
            "entity": {"id": "e", "name": given["entityName"] or "someone"},
        }
        return {"upsertSweep": {"sweep": {"id": name, "name": name, "project": place}, "configValidationWarnings": []}}

    def _sweep_of(self, given: dict[str, Any]) -> dict[str, Any]:
        held = {"id": given["sweep"], "name": given["sweep"], "method": "random", "state": "RUNNING", "description": ""}
        held |= {"config": self.sweeps[given["sweep"]]["config"], "runs": {"edges": []}}
        return {"project": {"sweep": held}}

    def _heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep, commands = self.sweeps[given["id"]], []
        if not json.loads(given["runState"]):  # nothing is running
            point = sweep["left"].pop(0) if sweep["left"] else None
            if point is None:
                commands = [{"type": "exit"}]
            else:
                name = f"{given['id']}run{len(sweep['sent'])}"
                sweep["sent"].append(name)
                args = {key: {"value": value} for key, value in point.items()}
                commands = [{"id": name, "type": "run", "run_id": name, "program": "m4train", "args": args}]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _alert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.run(given["entityName"], given["projectName"], given["runName"]).alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def do_POST(self) -> None:
        body = self._json()
        if self.path.endswith("/file_stream"):
            _, _, entity, project, run, _ = self.path.split("/")
            with self.server_state.lock:
                self._send(self.server_state.stream(entity, project, run, body))
            return
        data = self.server_state.answer(body.get("query", ""), body.get("variables") or {})
        self._send({"errors": [{"message": "this server does not know it"}]} if data is None else {"data": data})

    def do_PUT(self) -> None:
        content = self._body()
        self.server_state.storage[self.path.removeprefix("/storage/")] = content
        self._send({}, {"ETag": hashlib.md5(content).hexdigest()})

    def do_GET(self) -> None:
        found = self.server_state.storage.get(self.path.removeprefix("/storage/"))
        if found is None:
            self._send({}, status=404)
            return
        digest = base64.b64encode(hashlib.md5(found).digest()).decode()
        self._send(found, {"ETag": digest})

    def _json(self) -> dict[str, Any]:
        try:
            return json.loads(self._body() or b"{}")
        except ValueError:  # not for the API: telemetry
            return {}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        return


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A fresh server, until the end of the block."""
    state = Server()
    handler = type("Handler", (_Handler,), {"server_state": state})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    state.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
