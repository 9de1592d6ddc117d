"""A server that speaks the protocol of the Hugging Face Hub, as far as uploading and downloading a
model need it: repositories, commits, large files, revisions, tokens.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_mine": "me", "hf_other": "other"}  # and whose they are


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oldest first
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        whole = {**(list(self.commits.values())[-1] if self.commits else {}), **files}
        name = hashlib.sha1(json.dumps([len(self.commits), sorted(whole)]).encode()).hexdigest()
        self.commits[name] = whole
        return name

    def resolved(self, revision: str) -> str | None:
        if revision == "main" and self.commits:
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256, until they are committed
    asked: list[str] = field(default_factory=list)  # method and path of every request
    broken: bool = False  # answers 500 to everything

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that uses this hub. Its cache and its token are to be chosen, too."""
        # The other way of uploading needs servers of its own.
        return {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def handle_request(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken:
            return self.answer(500, {"error": "out of order"})
        if "Authorization" in self.headers and self.user is None:
            error = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": error}, X_Error_Message=error)
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = data
            return self.answer(200, {})
        known = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path)
        repository = self.hub.repositories.get(known[1]) if known else None
        if known is None or repository is None or (repository.private and self.user != "me"):
            return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        return self.of_repository(known[1], repository, (known[2] or "").split("/")[1:], data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (the server's names)

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if self.user != wanted["organization"]:
            error = f"You don't have the rights to create a model under {wanted['organization']}"
            return self.answer(403 if self.user else 401, {"error": error})
        if name in self.hub.repositories:
            return self.answer(409, {"url": f"{self.hub.url}/{name}", "error": "there already"})
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.hub.repositories[name] = Repository(private)
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def of_repository(self, name: str, repository: Repository, rest: list, data: bytes) -> None:
        match rest:
            case []:
                about = {"id": name, "private": repository.private, "siblings": [], "tags": []}
                self.answer(200, about)
            case ["preupload", _]:
                files = json.loads(data)["files"]
                for file in files:
                    mode = "lfs" if file["path"].endswith("tensors") else "regular"
                    file |= {"uploadMode": mode, "shouldIgnore": False}
                self.answer(200, {"files": files})
            case ["info", "lfs", "objects", "batch"]:
                objects = json.loads(data)["objects"]
                for each in objects:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}
                self.answer(200, {"objects": objects})
            case ["commit", _]:
                files = {}
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.hub.large[value["oid"]]
                commit = repository.commit(files)
                url = f"{self.hub.url}/{name}/commit/{commit}"
                self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
            case ["resolve", revision, *file]:
                self.resolve(repository, revision, "/".join(file))

    def resolve(self, repository: Repository, revision: str, file: str) -> None:
        commit = repository.resolved(revision)
        if repository.gated:
            return self.answer(403, {}, X_Error_Code="GatedRepo")
        if commit is None:
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        if file not in (files := repository.commits[commit]):
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        return self.answer(200, files[file], ETag=etag, X_Repo_Commit=commit)


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    _Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    with serving(server):
        yield _Handler.hub
