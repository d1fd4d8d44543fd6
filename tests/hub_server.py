"""A small Hugging Face hub: the routes that huggingface_hub asks for, on this machine, in memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

from aiohttp import web

TOKEN = "hf_test"
LARGE = (".safetensors", ".parquet", ".pt")
"""Files of these kinds are kept in LFS, as the hub's `.gitattributes` says."""


@dataclass
class Repository:
    """Its commits, each a tree of files, and what names them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b""})

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        tree = self.commits.get(self.refs.get(branch, ""), {}) | changes
        names = json.dumps([[name, _git_id(data)] for name, data in sorted(tree.items())])
        self.refs[branch] = hashlib.sha1(names.encode()).hexdigest()
        self.commits[self.refs[branch]] = tree
        return self.refs[branch]


@dataclass
class Hub:
    """A running server, and what it holds."""

    url: str = ""
    store: str = ""
    """Its address for large files: as on the real one another host, to which no token goes."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of LFS, by SHA-256."""
    requests: list[str] = field(default_factory=list)
    """Methods and paths, in the order of their arrival."""

    def _found(self, request: web.Request) -> tuple[Repository, str, dict[str, bytes]]:
        """Repository, commit and tree that a request names."""
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name not in self.repositories:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"})
        repository = self.repositories[name]
        revision = unquote(request.match_info.get("revision", "main"))
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return repository, commit, repository.commits[commit]

    async def reached(self, request: web.Request) -> web.Response:
        return web.Response()

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"{body['organization']}/{body['name']}"
        if name in self.repositories:
            error = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            raise web.HTTPConflict(text=json.dumps(error), content_type="application/json")
        self.repositories[name] = Repository()
        return web.json_response({"url": f"{self.url}/{name}", "name": name})

    async def info(self, request: web.Request) -> web.Response:
        _, commit, tree = self._found(request)
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        card = {"license": "mit"} if name == "someone/clip" else None
        siblings = [{"rfilename": path} for path in tree]
        return web.json_response({"id": name, "sha": commit, "siblings": siblings, "cardData": card})

    async def tree(self, request: web.Request) -> web.Response:
        _, _, tree = self._found(request)
        return web.json_response([_entry(path, data) for path, data in sorted(tree.items())])

    async def validate(self, request: web.Request) -> web.Response:
        assert (await request.json())["content"].startswith("---\n")
        return web.json_response({"errors": [], "warnings": []})

    async def preupload(self, request: web.Request) -> web.Response:
        _, _, tree = self._found(request)
        files = []
        for one in (await request.json())["files"]:
            mode = "lfs" if one["path"].endswith(LARGE) else "regular"
            oid = _entry(one["path"], tree[one["path"]])["oid"] if one["path"] in tree else None
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return web.json_response({"files": files})

    async def batch(self, request: web.Request) -> web.Response:
        objects = []
        for one in (await request.json())["objects"]:
            missing = one["oid"] not in self.objects
            target = f"{self.store}/lfs/{one['oid']}"
            actions = {"actions": {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}}
            objects.append(one | (actions if missing else {}))
        return web.json_response({"transfer": "basic", "objects": objects})

    async def upload(self, request: web.Request) -> web.Response:
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.objects[request.match_info["oid"]] = data
        return web.Response()

    async def verify(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert len(self.objects[body["oid"]]) == body["size"]
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        repository, _, _ = self._found(request)
        header, *lines = [json.loads(line) for line in (await request.read()).splitlines()]
        assert header["key"] == "header"
        assert header["value"]["summary"]
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                changes[value["path"]] = self.objects[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                changes[value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(unquote(request.match_info["revision"]), changes)
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        return web.json_response({"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid})

    async def resolve(self, request: web.Request) -> web.Response:
        _, commit, tree = self._found(request)
        path, headers = request.match_info["path"], {"X-Repo-Commit": commit}
        if path not in tree:
            raise web.HTTPNotFound(headers=headers | {"X-Error-Code": "EntryNotFound"})
        entry = _entry(path, tree[path])
        if "lfs" not in entry:
            return web.Response(body=tree[path], headers=headers | {"ETag": f'"{entry["oid"]}"'})
        oid = entry["lfs"]["oid"]
        self.objects[oid] = tree[path]
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(tree[path]))}
        raise web.HTTPFound(f"{self.store}/lfs/{oid}", headers=headers | linked)

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(body=self.objects[request.match_info["oid"]])

    @web.middleware
    async def watched(self, request: web.Request, handler) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        writes = request.method == "POST" and (request.path.startswith("/api/") or "/info/lfs/" in request.path)
        if writes and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise web.HTTPUnauthorized(text='{"error": "Invalid username or password."}')
        return await handler(request)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.watched], client_max_size=2**26)
        repo = "/{owner}/{name}"
        app.add_routes(
            [
                web.get("/", self.reached),
                web.post("/api/repos/create", self.create),
                web.post("/api/validate-yaml", self.validate),
                web.get(f"/api/models{repo}", self.info),
                web.get(f"/api/models{repo}/revision/{{revision:.+}}", self.info),
                web.get(f"/api/models{repo}/tree/{{revision}}", self.tree),
                web.post(f"/api/models{repo}/preupload/{{revision}}", self.preupload),
                web.post(f"/api/models{repo}/commit/{{revision}}", self.commit),
                web.post("/{owner}/{name}.git/info/lfs/objects/batch", self.batch),
                web.put("/lfs/{oid}", self.upload),
                web.get("/lfs/{oid}", self.download),
                web.post("/lfs/{oid}/verify", self.verify),
                web.get(f"{repo}/resolve/{{revision}}/{{path:.+}}", self.resolve),
            ]
        )
        return app


def _entry(path: str, data: bytes) -> dict:
    """A file as the hub lists it: its id is that of git, for LFS that of the pointer."""
    sha256 = hashlib.sha256(data).hexdigest()
    if not path.endswith(LARGE):
        return {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": _git_id(pointer), "lfs": lfs}


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port, in a thread of its own."""
    hub, loop, ready = Hub(), asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        runner = web.AppRunner(hub.application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        hub.url, hub.store = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
