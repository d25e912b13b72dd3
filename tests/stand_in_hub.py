"""A stand-in for the Hugging Face hub on this machine: repositories in memory behind the few requests of its client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_abc"  # may write to the repositories of "me"
_RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
_WRITE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sha, the last one is main
    refs: dict[str, str] = field(default_factory=dict)  # other branches -> sha
    gated: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = list(self.commits)[-1] if revision == "main" and self.commits else self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def add(self, files: dict[str, bytes], branch: str = "main") -> str:
        kept = list(self.commits.values())[-1] if self.commits and branch == "main" else {}
        sha = hashlib.sha1(repr((sorted((kept | files).items()), len(self.commits))).encode()).hexdigest()
        if branch == "main":
            self.commits[sha] = kept | files
        else:
            self.commits = {sha: files, **self.commits}
            self.refs[branch] = sha
        return sha


class Hub:
    """Repositories by kind and name, and the requests that were answered."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.address = ""

    def put(self, name: str, files: dict[str, bytes], kind: str = "models", branch: str = "main") -> str:
        """Add a commit, and the repository if it is new; return the commit's SHA."""
        return self.repositories.setdefault((kind, name), Repository()).add(files, branch)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

        def may(self, repository: Repository | None) -> bool:
            token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository.private and not token):
                self.refuse(401, "RepoNotFound", "Repository not found")
                return False
            if repository.gated and not token:
                self.refuse(403, "GatedRepo", "Access is restricted")
                return False
            return True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            if path == "/":
                self.answer(200)
            elif found := _INFO.fullmatch(path):
                repository = hub.repositories.get((found["kind"], found["name"]))
                if self.may(repository):
                    commit = repository.find(found["revision"] or "main")
                    if commit is None:
                        self.refuse(404, "RevisionNotFound", "Revision not found")
                        return
                    siblings = [{"rfilename": name} for name in commit[1]]
                    self.answer(200, {"id": found["name"], "sha": commit[0], "siblings": siblings, "private": False,
                                      "downloads": 0, "likes": 0, "tags": []})  # fmt: skip
            elif found := _RESOLVE.fullmatch(path):
                kind = "datasets" if found["kind"] else "models"
                repository = hub.repositories.get((kind, found["name"]))
                if self.may(repository):
                    commit = repository.find(found["revision"])
                    if commit is None or found["file"] not in commit[1]:
                        self.refuse(404, "EntryNotFound", "Entry not found")
                        return
                    content = commit[1][found["file"]]
                    self.answer(200, content, X_Repo_Commit=commit[0], ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            else:
                self.answer(404, {"error": f"no {path}"})

        def do_POST(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"POST {path}")
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(401, "", "Invalid username or password.")
            elif path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if not name.startswith("me/"):
                    self.refuse(403, "", f"You don't have the rights to create a model under {name.split('/')[0]}")
                elif ("models", name) in hub.repositories:
                    self.answer(409, {"error": "You already created this model repo", "url": f"{hub.address}/{name}"})
                else:
                    private = asked.get("private") or asked.get("visibility") == "private"
                    hub.repositories["models", name] = Repository(private=bool(private))
                    self.answer(200, {"url": f"{hub.address}/{name}", "name": name})
            elif found := _WRITE.fullmatch(path):
                repository = hub.repositories["models", found["name"]]
                if found["what"] == "preupload":
                    files = [each["path"] for each in json.loads(content)["files"]]
                    modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in files]
                    self.answer(200, {"files": modes})
                    return
                lines = [json.loads(line) for line in content.splitlines()]
                files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                         for line in lines if line["key"] == "file"}  # fmt: skip
                sha = repository.add(files)
                self.answer(200, {"commitUrl": f"{hub.address}/{found['name']}/commit/{sha}", "commitOid": sha,
                                  "success": True, "hookOutput": ""})  # fmt: skip
            else:
                self.answer(404, {"error": f"no {path}"})

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Answer requests on a free port of this machine within the block; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def connected(hub: Hub, patch: pytest.MonkeyPatch, cache: Any, token: str | None = None) -> Iterator[Hub]:
    """Point the hub's client to the stand-in within the block, with an empty cache and this token."""
    from potstill import hub as client

    def forget() -> None:
        client.fetch_model.cache_clear()
        client.fetch_dataset.cache_clear()

    with serve(hub) as address:
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        patch.setenv("NO_PROXY", "127.0.0.1")
        forget()
        yield hub
        forget()
