"""A local server that speaks as much of the Hub's API as uploads and downloads of models need, and fails on demand.

    with HubServer() as hub:
        hub.fail("PUT", "/storage/", times=1)              # the next PUT there is answered with HTTP 500
        hub.fail("POST", "/commit/", times=1, how="drop")  # the connection is closed without an answer
        HfApi(endpoint=hub.url).upload_folder(...)
        hub.files("owner/name")                            # {path: bytes} of branch main

Xet must be off in the client (`HF_HUB_DISABLE_XET=1`, or `huggingface_hub.constants.HF_HUB_DISABLE_XET`): only the
older LFS transfer is spoken here. Runs alone, too: `python hub_server.py` prints its address and serves until stopped.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

NO_REPO, NO_FILE, NO_BRANCH = "RepoNotFound", "EntryNotFound", "RevisionNotFound"
Reply = tuple[int, Any, dict[str, str]]


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # branch, summary, changed paths

    def head(self, branch: str) -> str:
        return hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()


@dataclass
class Fault:
    method: str
    path: str
    times: int
    how: str


class HubServer:
    """State, faults and request log; a context manager that serves on a free local port."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = {"hf_good"}
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, path: str, times: int, how: str = "500") -> None:
        """Fail the next `times` requests of a method whose path contains `path`, with a status or by `"drop"`."""
        self.faults.append(Fault(method, path, times, how))

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]

    def count(self, method: str, path: str) -> int:
        """How many requests of a method had `path` in their path."""
        return sum(m == method and path in p for m, p in self.requests)

    # ---- one request ----

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Reply | None:
        """The reply, or None to drop the connection."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return None if fault.how == "drop" else (int(fault.how), {"error": "injected"}, {})
            for verb, pattern, act in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in verb.split("|"):
                    if method not in ("GET", "HEAD", "PUT") and token not in self.tokens:
                        return 401, {"error": "Invalid credentials"}, {}
                    return act(self, body, *found.groups())
        return 404, {"error": f"no route for {method} {path}"}, {}

    def whoami(self, _body: bytes) -> Reply:
        return 200, {"name": "tester", "type": "user", "orgs": []}, {}

    def create(self, body: bytes) -> Reply:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        link = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return 409, {**link, "error": "You already created this model repo"}, {}
        self.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, link, {}

    def branch(self, _body: bytes, repo: str, name: str) -> Reply:
        branches = self.repos[repo].branches
        if name in branches:
            return 409, {"error": "Reference already exists"}, {}
        branches[name] = dict(branches["main"])
        return 201, {}, {}

    def validate(self, body: bytes) -> Reply:
        import yaml

        parts = json.loads(body)["content"].split("---\n")
        try:
            valid = len(parts) < 3 or isinstance(yaml.safe_load(parts[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "metadata is not YAML"}]
        return 200 if valid else 400, {"errors": errors, "warnings": []}, {}

    def preupload(self, body: bytes, repo: str, branch: str) -> Reply:
        if branch not in self.repos[repo].branches:
            return 404, {"error": "no branch"}, {"X-Error-Code": NO_BRANCH}
        there, answers = self.repos[repo].branches[branch], []
        for file in json.loads(body)["files"]:
            name = file["path"]
            large = name.endswith(".safetensors")
            oid = None
            if name in there:
                data = there[name]
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                oid = hashlib.sha256(data).hexdigest() if large else git
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def batch(self, body: bytes, repo: str) -> Reply:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.storage:
                base = f"{self.url}/storage/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": base}, "verify": {"href": base + "/verify"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def store(self, body: bytes, oid: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the hash does not fit"}, {}
        self.storage[oid] = body
        return 200, {}, {}

    def stored(self, _body: bytes, oid: str) -> Reply:
        return (200 if oid in self.storage else 404), {}, {}

    def commit(self, body: bytes, repo: str, branch: str) -> Reply:
        found = self.repos[repo]
        files, changed, summary = found.branches[branch], [], ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                summary = value["summary"]
                continue
            changed.append(value["path"])
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.storage[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        found.commits.append((branch, summary, tuple(changed)))
        oid = found.head(branch)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}, {}

    def info(self, _body: bytes, repo: str, branch: str | None) -> Reply:
        if repo not in self.repos:
            return 404, {"error": "no repo"}, {"X-Error-Code": NO_REPO}
        found, branch = self.repos[repo], branch or "main"
        if branch not in found.branches:
            return 404, {"error": "no branch"}, {"X-Error-Code": NO_BRANCH}
        siblings = [{"rfilename": name} for name in found.branches[branch]]
        facts = {"id": repo, "sha": found.head(branch), "siblings": siblings, "tags": [], "private": found.private}
        return 200, facts, {}

    def tree(self, _body: bytes, repo: str, branch: str) -> Reply:
        if repo not in self.repos:
            return 404, {"error": "no repo"}, {"X-Error-Code": NO_REPO}
        if branch not in self.repos[repo].branches:  # a commit: only heads are ever asked for
            branch = next((b for b in self.repos[repo].branches if self.repos[repo].head(b) == branch), "main")
        files = self.repos[repo].branches[branch].items()
        return (
            200,
            [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files],
            {},
        )

    def resolve(self, _body: bytes, repo: str, revision: str, path: str) -> Reply:
        if repo not in self.repos:
            return 404, {"error": "no repo"}, {"X-Error-Code": NO_REPO}
        found = self.repos[repo]
        branch = next((b for b in found.branches if revision in (b, found.head(b))), None)
        if branch is None:
            return 404, {"error": "no branch"}, {"X-Error-Code": NO_BRANCH}
        if path not in found.branches[branch]:
            return 404, {"error": "no file"}, {"X-Error-Code": NO_FILE, "X-Repo-Commit": found.head(branch)}
        data = found.branches[branch][path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return 200, data, {"ETag": etag, "X-Repo-Commit": found.head(branch), "Accept-Ranges": "bytes"}


_R = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/repos/create", HubServer.create),
    ("POST", "/api/validate-yaml", HubServer.validate),
    ("POST", f"/api/models/{_R}/branch/(.+)", HubServer.branch),
    ("POST", f"/api/models/{_R}/preupload/(.+)", HubServer.preupload),
    ("POST", f"/api/models/{_R}/commit/(.+)", HubServer.commit),
    ("POST", rf"/{_R}\.git/info/lfs/objects/batch", HubServer.batch),
    ("PUT", "/storage/([0-9a-f]{64})", HubServer.store),
    ("POST", "/storage/([0-9a-f]{64})/verify", HubServer.stored),
    ("GET", f"/api/models/{_R}/tree/([^/]+)", HubServer.tree),
    ("GET", f"/api/models/{_R}(?:/revision/(.+))?", HubServer.info),
    ("GET|HEAD", f"/{_R}/resolve/([^/]+)/(.+)", HubServer.resolve),
)


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def serve(self) -> None:
            body = self.read_body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            reply = hub.answer(self.command, unquote(urlsplit(self.path).path), body, token)
            if reply is None:
                self.close_connection = True
                return
            status, content, headers = reply
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    return Handler


if __name__ == "__main__":
    with HubServer() as server:
        print(server.url, flush=True)
        threading.Event().wait()
