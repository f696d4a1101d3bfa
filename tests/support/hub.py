"""A Hugging Face Hub of a few folders, on this machine: what huggingface_hub asks one for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}
NO_REPOSITORY, NO_REVISION, GATED = "RepoNotFound", "RevisionNotFound", "GatedRepo"


@dataclass
class Hub:
    """repositories: folders by id and revision. gated: ids. asked: paths of files, in order."""

    repositories: Mapping[str, Mapping[str, Path]]
    gated: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def folder(self, repository: str, revision: str) -> Path | str:
        """Or the code of what is wrong."""
        named = {COMMITS[name]: name for name in COMMITS}.get(revision, revision)
        if repository not in self.repositories:
            return NO_REPOSITORY
        if repository in self.gated:
            return GATED
        return self.repositories[repository].get(named, NO_REVISION)

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | str:
        kind, *rest = path.strip("/").split("/")
        if kind == "api":
            return self._listed("/".join(rest[1:3]), *rest[3:4], revision="/".join(rest[4:]))
        repository, revision, file = f"{kind}/{rest[0]}", rest[2], "/".join(rest[3:])
        found = self.folder(repository, revision)
        if isinstance(found, str):
            return found
        self.asked.append(file)
        data = (found / file).read_bytes()
        return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": revision}

    def _listed(
        self, repository: str, what: str = "revision", revision: str = ""
    ) -> tuple[bytes, dict[str, str]] | str:
        revision = revision or "main"
        folder = self.folder(repository, revision)
        if isinstance(folder, str):
            return folder
        if what == "revision":
            found: object = {"id": repository, "sha": COMMITS.get(revision, revision)}
        else:
            files = sorted(x for x in folder.rglob("*") if x.is_file())
            found = [
                {
                    "type": "file",
                    "path": x.relative_to(folder).as_posix(),
                    "size": x.stat().st_size,
                    "oid": hashlib.sha1(x.read_bytes()).hexdigest(),
                }
                for x in files
            ]
        return json.dumps(found).encode(), {"Content-Type": "application/json"}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at its `url`, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = hub.answer(unquote(urlparse(self.path).path))
            codes = {NO_REPOSITORY: 404, NO_REVISION: 404, GATED: 403}
            data, headers = (b"", {"X-Error-Code": answer}) if isinstance(answer, str) else answer
            self.send_response(codes[answer] if isinstance(answer, str) else 200)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *given: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
