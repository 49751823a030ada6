"""The part of the Hub's HTTP API that the `kernels` client uses, served on loopback.

A test publishes folders as kernel repositories and points `HF_ENDPOINT` at `HubEndpoint.url`. What
the client then does is what it does with the real Hub: it lists the version branches, lists the
tree, picks a variant, downloads its files and stores them in its cache.

Facts about the routes are those of huggingface_hub 1.33 (`HfApi`) and kernels 0.16.2.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

# Files that the Hub keeps in LFS: their address in the client's cache is a sha256, not a git hash.
LFS_SUFFIXES = (".so",)


@dataclass(frozen=True)
class HubFile:
    """One file of a snapshot: what the tree lists, and the bytes that a download gets."""

    listed: bytes
    served: bytes
    lfs: bool

    @cached_property
    def blob_id(self) -> str:
        header = f"blob {len(self.listed)}\0".encode()
        return hashlib.sha1(header + self.listed).hexdigest()

    @cached_property
    def etag(self) -> str:
        return hashlib.sha256(self.listed).hexdigest() if self.lfs else self.blob_id

    def tree_entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.listed), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.listed), "pointerSize": 130}
        return entry


@dataclass
class Snapshot:
    """The files of one commit. The commit's name is the hash of what it lists, as in git."""

    files: dict[str, HubFile]

    @classmethod
    def of_folder(cls, folder: Path) -> Snapshot:
        """Everything under `folder` but bytecode, links to folders followed."""
        files = {}
        for directory, subdirectories, names in os.walk(folder, followlinks=True):
            subdirectories[:] = [name for name in subdirectories if name != "__pycache__"]
            for name in names:
                path = Path(directory) / name
                content = path.read_bytes()
                lfs = path.suffix in LFS_SUFFIXES
                files[path.relative_to(folder).as_posix()] = HubFile(content, content, lfs)
        return cls(files)

    @cached_property
    def commit(self) -> str:
        listing = "\n".join(f"{path} {self.files[path].blob_id}" for path in sorted(self.files))
        return hashlib.sha1(listing.encode()).hexdigest()

    def serve_instead(self, path: str, content: bytes) -> None:
        """Downloads of `path` get `content`, while the tree still lists what was published."""
        published = self.files[path]
        self.files[path] = HubFile(published.listed, content, published.lfs)

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, file in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            names = path[len(prefix) :].split("/")
            if recursive or len(names) == 1:
                entries[path] = file.tree_entry(path)
            else:
                subfolder = prefix + names[0]
                oid = hashlib.sha1(subfolder.encode()).hexdigest()
                entries[subfolder] = {"type": "directory", "path": subfolder, "oid": oid}
        return list(entries.values())


@dataclass
class Repository:
    """A kernel repository: its branches (`v1`, `main`, ...)."""

    branches: dict[str, Snapshot] = field(default_factory=dict)

    def snapshot(self, revision: str) -> Snapshot | None:
        for name, snapshot in self.branches.items():
            if revision in (name, snapshot.commit):
                return snapshot
        return None


class HubEndpoint:
    """Serves `repositories` at `url` from `__enter__` to `__exit__`; `requests` lists what was asked.

    `trusted` holds the publishers that the Hub vouches for (no `trust_remote_code` needed).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.trusted: set[str] = set()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def publish(self, repo_id: str, folder: Path, *branches: str) -> Snapshot:
        """Puts the files of `folder` on `branches` of `repo_id`, as one commit, and returns it."""
        snapshot = Snapshot.of_folder(folder)
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.branches.update(dict.fromkeys(branches, snapshot))
        return snapshot

    def downloads(self) -> list[str]:
        """The paths inside repositories of which content was sent, in order."""
        sent = [request for request in self.requests if request.startswith("GET /kernels/")]
        return [request.split("/resolve/", 1)[1].split("/", 1)[1] for request in sent]

    def __enter__(self) -> HubEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()


def _handler(hub: HubEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            address = urlsplit(self.path)
            hub.requests.append(f"{self.command} {address.path}")
            parts = [unquote(part) for part in address.path.strip("/").split("/")]
            recursive = parse_qs(address.query).get("recursive", ["false"])[0].lower() in (
                "true",
                "1",
            )
            match parts:
                case ["api", "organizations", name, "overview"]:
                    trusted = name in hub.trusted
                    self._json({"name": name, "fullname": name, "trustedKernelPublisher": trusted})
                case ["api", "kernels", owner, name, *route]:
                    self._api(f"{owner}/{name}", route, recursive)
                case ["kernels", owner, name, "resolve", revision, *path]:
                    self._file(f"{owner}/{name}", revision, "/".join(path))
                case _:
                    self._refuse(404, "RouteNotFound")

        def _api(self, repo_id: str, route: list[str], recursive: bool) -> None:
            repository = hub.repositories.get(repo_id)
            if repository is None:
                return self._refuse(404, "RepoNotFound")
            if route == ["refs"]:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": snapshot.commit}
                    for name, snapshot in repository.branches.items()
                ]
                return self._json({"branches": branches, "converts": [], "tags": []})
            match route:
                case ["revision", revision]:
                    snapshot = repository.snapshot(revision)
                    if snapshot is not None:
                        return self._json({"id": repo_id, "sha": snapshot.commit})
                    return self._refuse(404, "RevisionNotFound")
                case ["tree", revision, *folder]:
                    snapshot = repository.snapshot(revision)
                    if snapshot is None:
                        return self._refuse(404, "RevisionNotFound")
                    entries = snapshot.tree("/".join(folder), recursive)
                    return self._json(entries) if entries else self._refuse(404, "EntryNotFound")
            self._refuse(404, "RouteNotFound")

        def _file(self, repo_id: str, revision: str, path: str) -> None:
            repository = hub.repositories.get(repo_id)
            if repository is None:
                return self._refuse(404, "RepoNotFound")
            snapshot = repository.snapshot(revision)
            if snapshot is None:
                return self._refuse(404, "RevisionNotFound")
            headers = {"X-Repo-Commit": snapshot.commit}
            file = snapshot.files.get(path)
            if file is None:
                return self._refuse(404, "EntryNotFound", headers)
            headers["ETag"] = f'"{file.etag}"'
            headers["X-Linked-Size"] = str(len(file.listed))
            self._send(200, file.served, "application/octet-stream", headers)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), "application/json", {})

        def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": code} | (headers or {})
            self._send(status, b"{}", "application/json", headers)

        def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                # A client that gave up is no error of the server.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

    return Handler
