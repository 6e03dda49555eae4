"""A server that remembers what wandb uploads: as little of the real one as runs, rows, files and artifacts need."""

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Listens on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.artifacts: list[str] = []
        self.exit_codes: list[int] = []
        self.received: list[bytes] = []
        self.refusing = False
        """Whether it takes no rows, as one that is overloaded."""

    def handle_error(self, *_: object) -> None:
        """A client that closes without a word is none of ours."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of a run, by their place in it."""
        return [row for _, row in sorted(self.rows.get(run, {}).items())]

    def answer(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answer a question of GraphQL."""
        owner = {"id": "1", "name": "somebody"}
        project = {"id": "2", "name": values.get("project") or "p", "entity": owner}
        run = str(values.get("name"))
        if name == "Viewer":
            return {"viewer": owner | {"entity": "somebody", "username": "somebody", "flags": "{}"}}
        if name == "RunResumeStatus" and run in self.configs:
            rows = self.history(run)
            bucket = {
                "id": "3",
                "name": run,
                "displayName": run,
                "summaryMetrics": json.dumps(self.summaries.get(run, {})),
                "logLineCount": 0,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
                "eventsTail": "[]",
                "config": self.configs[run],
                "tags": [],
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {"model": project | {"bucket": bucket}}
        if name == "UpsertBucket":
            inserted = run not in self.configs
            self.configs[run] = values.get("config") or self.configs.get(run, "{}")
            bucket = {"id": "3", "name": run, "displayName": run, "config": self.configs[run], "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/file/{file}"} for file in values["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            self.artifacts.append(values["input"]["artifactCollectionName"])
            sequence = {"id": "5", "latestArtifact": None}
            artifact = {"id": str(len(self.artifacts) - 1), "state": "PENDING", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if name in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            place = {"id": "7", "uploadUrl": f"{self.url}/manifest/{len(self.artifacts)}", "uploadHeaders": []}
            return {f"{name[0].lower()}{name[1:]}": {"artifactManifest": {"id": "6", "file": place}}}
        if name == "CreateArtifactFiles":
            wanted = values["input"]["artifactFiles"]
            edges = [
                {
                    "node": {
                        "id": "8",
                        "name": file["name"],
                        "displayName": file["name"],
                        "uploadUrl": f"{self.url}/artifact/{self.artifacts[int(file['artifactID'])]}/{file['name']}",
                        "uploadHeaders": [],
                        "artifact": {"id": file["artifactID"]},
                    }
                }
                for file in wanted
            ]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "0"}}}
        return dict.fromkeys(("model", "project", "artifact", "serverInfo"))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path] = self.content()
        self.reply({})

    def do_POST(self) -> None:
        content = json.loads(self.content() or b"{}")
        if self.path.endswith("/graphql"):
            name = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])
            self.reply({"data": self.server.answer(name[1] if name else "", content.get("variables") or {})})
            return
        if self.server.refusing:
            self.reply({}, 503)
            return
        run = self.path.split("/")[-2]
        for file, chunk in (content.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"] if file.endswith((".json", ".jsonl"))]
            if file == "wandb-history.jsonl":
                self.server.rows.setdefault(run, {}).update(enumerate(lines, chunk["offset"]))
            elif file == "wandb-summary.json":
                self.server.summaries[run] = lines[-1]
        if content.get("complete"):
            self.server.exit_codes.append(content["exitcode"])
        self.reply({"exitcode": None, "limits": {}})

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.received.append(content)
        return content

    def reply(self, value: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Have a server for a while."""
    server = WandbServer()
    thread = Thread(target=server.serve_forever, name="wandb server", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
