"""A Hub on 127.0.0.1 for tests: what huggingface_hub 2.4 asks of the real one, with tokens, private repositories, LFS.

    with LocalHub() as hub:
        run(script, env=hub.environment("alice", home))
        assert "config.json" in hub.files("alice/model")

The storage of large files answers on a port of its own, as the real one is on another host: no token may reach it.
State is in memory and ends with the `with` block.
"""

import asyncio
import base64
import copy
import json
import logging
import os
import secrets
import threading
from dataclasses import dataclass
from hashlib import sha1, sha256
from typing import Any

import yaml
from aiohttp import web
from hub_faults import FaultPlan, commit_fault
from hub_state import HubError, Repo, StoredFile

STORAGE_LIMIT = 2**29
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".tar.gz", ".zip")
WRITE_METHODS = {"preupload", "commit", "branch", "batch"}


@dataclass(frozen=True)
class Call:
    """One request: `user` is None without a token, `storage` tells the large-file storage from the Hub."""

    method: str
    path: str
    user: str | None
    authorized: bool
    storage: bool
    status: int


class LocalHub(FaultPlan):
    """The server, in a thread of its own; `endpoint`, `tokens` (by user), `calls` and the faults to inject."""

    def __init__(self, users: tuple[str, ...] = ("alice", "bob")):
        super().__init__()
        self.tokens = {user: f"hf_{secrets.token_hex(17)}" for user in users}
        self.calls: list[Call] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.published: set[bytes] = set()  # every content of every commit so far
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-hub", daemon=True)

    def __enter__(self) -> "LocalHub":
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # dropped connections are meant
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        application = web.Application(middlewares=[self._middleware], client_max_size=STORAGE_LIMIT)
        application.add_routes(self._routes())
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        ports = []
        for _ in range(2):
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            ports.append(self._runner.addresses[-1][1])
        self.endpoint, self.storage_endpoint = (f"http://127.0.0.1:{port}" for port in ports)

    def environment(self, user: str | None, home: Any, **extra: str) -> dict[str, str]:
        """Variables for a fresh process that uses this Hub as `user`, with its cache below `home`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        token = {} if user is None else {"HF_TOKEN": self.tokens[user]}
        return inherited | token | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                                    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}  # fmt: skip

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Contents of a revision, without the `.gitattributes` that every repository has."""
        repo = self.repos[kind, repo_id]
        files = repo.commits[repo.resolve(revision)]
        return {path: file.data for path, file in files.items() if path != ".gitattributes"}

    def requested(self, part: str) -> list[Call]:
        """The requests so far whose path contains this part."""
        return [call for call in self.calls if part in call.path]

    def save(self) -> Any:
        """What is stored now, for `restore`."""
        return copy.deepcopy((self.repos, self.storage))

    def restore(self, state: Any) -> None:
        """Back to a saved state, without calls and faults."""
        self.repos, self.storage = copy.deepcopy(state)
        self.calls.clear()
        self.clear()

    def _routes(self) -> list[web.RouteDef]:
        repo = "/api/{kind:models|datasets}/{owner}/{name}"
        routes = [
            web.get("/api/whoami-v2", self._whoami),
            web.post("/api/validate-yaml", self._validate_yaml),
            web.post("/api/repos/create", self._create),
            web.delete("/api/repos/delete", self._delete),
            web.get(repo, self._info),
            web.get(repo + "/revision/{revision}", self._info),
            web.get(repo + "/tree/{revision}", self._tree),
            web.get(repo + "/tree/{revision}/{path:.*}", self._tree),
            web.post(repo + "/paths-info/{revision}", self._paths_info),
            web.post(repo + "/preupload/{revision}", self._preupload),
            web.post(repo + "/branch/{revision}", self._branch),
            web.post(repo + "/commit/{revision}", self._commit),
            web.put("/storage/{oid}", self._put_object),
            web.get("/storage/{oid}", self._get_object),
        ]
        for prefix in ("/{kind:datasets}", ""):
            routes.append(web.post(prefix + "/{owner}/{name}.git/info/lfs/objects/batch", self._batch))
            routes.append(web.get(prefix + "/{owner}/{name}/resolve/{revision}/{path:.+}", self._resolve))
        return routes

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        async def answer(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except HubError as error:
                return error.answer

        fault = self.take(request.method, request.path)
        response = await (answer(request) if fault is None else commit_fault(fault, request, answer))
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        user = next((user for user, known in self.tokens.items() if known == token), None)
        storage = request.path.startswith("/storage/")
        self.calls.append(Call(request.method, request.path, user, bool(token), storage, response.status))
        return response

    def _user(self, request: web.Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        for user, known in self.tokens.items():
            if secrets.compare_digest(token.encode(), known.encode()):
                return user
        if token:
            raise HubError(401, "Invalid credentials in Authorization header")
        return None

    def _repo(self, request: web.Request, *, write: bool = False) -> tuple[str, Repo]:
        """The repository of a request, if its user may see (or change) it; a private one is not even admitted to."""
        user, match = self._user(request), request.match_info
        repo_id = f"{match['owner']}/{match['name']}"
        repo = self.repos.get((match.get("kind", "models"), repo_id))
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            raise HubError(403 if user else 401, f"You don't have the rights to write to {repo_id}")
        return repo_id, repo

    async def _whoami(self, request: web.Request) -> web.Response:
        user = self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return web.json_response({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {}})

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        try:
            _card_data((await request.json())["content"])
        except yaml.YAMLError as error:
            return web.json_response({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        return web.json_response({"errors": [], "warnings": []})

    async def _create(self, request: web.Request) -> web.Response:
        body, user = await request.json(), self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = body.get("organization") or user
        if owner != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind, repo_id = f"{body.get('type', 'model')}s", f"{owner}/{body['name']}"
        url = f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if (kind, repo_id) in self.repos:
            return web.json_response({"error": f"You already created this repo: {repo_id}", "url": url}, status=409)
        self.repos[kind, repo_id] = Repo(owner, body.get("visibility") == "private")
        return web.json_response({"url": url, "name": repo_id, "id": repo_id})

    async def _delete(self, request: web.Request) -> web.Response:
        body, user = await request.json(), self._user(request)
        key = (f"{body.get('type', 'model')}s", f"{body.get('organization') or user}/{body['name']}")
        if key not in self.repos or self.repos[key].owner != user:
            raise HubError(404, "Repository not found", "RepoNotFound")
        del self.repos[key]
        return web.Response()

    async def _info(self, request: web.Request) -> web.Response:
        repo_id, repo = self._repo(request)
        oid = repo.resolve(request.match_info.get("revision", "main"))
        files = repo.commits[oid]
        card = _card_data(files["README.md"].data.decode()) if "README.md" in files else {}
        return web.json_response(
            {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo.owner, "sha": oid,
             "private": repo.private, "tags": card.get("tags", []), "cardData": card, "downloads": 0, "likes": 0,
             "lastModified": "2026-01-01T00:00:00.000Z", "pipeline_tag": card.get("pipeline_tag"),
             "library_name": card.get("library_name"), "siblings": [{"rfilename": path} for path in sorted(files)]}
        )  # fmt: skip

    async def _tree(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        oid = repo.resolve(request.match_info["revision"])
        folder = request.match_info.get("path", "").strip("/")
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in repo.commits[oid].items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {request.match_info['revision']!r}", "EntryNotFound")
        recursive = request.query.get("recursive", "false").lower() in ("1", "true")
        folders = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
        entries = [
            {"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name}
            for name in sorted(folders)
            if name.startswith(prefix)
        ]
        entries += [_entry(path, file) for path, file in sorted(inside.items())]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return web.json_response(entries, headers={"X-Repo-Commit": oid})

    async def _paths_info(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request)
        files = repo.commits[repo.resolve(request.match_info["revision"])]
        paths = (await request.post()).getall("paths", [])
        return web.json_response([_entry(str(path), files[str(path)]) for path in paths if str(path) in files])

    async def _preupload(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request, write="create_pr" not in request.query)
        known = repo.commits[repo.resolve(request.match_info["revision"])]
        answers = []
        for file in (await request.json())["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            oid = {"oid": known[path].oid} if path in known else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return web.json_response({"files": answers})

    async def _branch(self, request: web.Request) -> web.Response:
        _, repo = self._repo(request, write=True)
        branch, body = request.match_info["revision"], await request.json()
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.resolve(body.get("startingPoint") or "main")
        return web.json_response({})

    async def _batch(self, request: web.Request) -> web.Response:
        self._repo(request)
        if self._user(request) is None:
            raise HubError(401, "Invalid username or password.")
        objects: list[dict[str, Any]] = []
        for item in (await request.json())["objects"]:
            upload = {"upload": {"href": f"{self.storage_endpoint}/storage/{item['oid']}"}}
            objects.append(dict(item) if item["oid"] in self.storage else {**item, "actions": upload})
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _put_object(self, request: web.Request) -> web.Response:
        data, oid = await request.read(), request.match_info["oid"]
        if sha256(data).hexdigest() != oid:
            raise HubError(400, "The provided 'x-amz-content-sha256' header does not match what was computed.")
        if sum(map(len, self.storage.values())) + len(data) > STORAGE_LIMIT:
            raise HubError(413, "The storage of this test server is full")
        self.storage[oid] = data
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        create_pr, branch = "create_pr" in request.query, request.match_info["revision"]
        repo_id, repo = self._repo(request, write=not create_pr)
        base = repo.resolve(branch)
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit", base)
        # As on the real one: whoever was overtaken while sending is refused, also without a parentCommit.
        if not create_pr and (repo.resolve(branch) != base or not base.startswith(parent)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = self._apply(repo.commits[repo.resolve(parent)], lines)
        self.published |= {file.data for file in files.values()}
        pull_request = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
        oid = repo.commit(pull_request if create_pr else branch, files, header["summary"])
        url = f"{self.endpoint}/{repo_id}"
        more = {"pullRequestUrl": f"{url}/discussions/{pull_request.rpartition('/')[2]}"} if create_pr else {}
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **more})

    def _apply(self, old: dict[str, StoredFile], lines: list[dict[str, Any]]) -> dict[str, StoredFile]:
        files = dict(old)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            elif key == "lfsFile" and value["oid"] not in self.storage:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            elif key == "lfsFile":
                files[value["path"]] = StoredFile(self.storage[value["oid"]], True)
            elif key == "deletedFile" and value["path"] not in files:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
        return files

    async def _resolve(self, request: web.Request) -> web.Response:
        """HEAD and GET of one file; a large one is a redirect to the storage, its size and checksum in headers."""
        _, repo = self._repo(request)
        oid = repo.resolve(request.match_info["revision"])
        file = repo.commits[oid].get(request.match_info["path"])
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", oid)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            return _content(request, file.data, headers)
        linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
        location = {"Location": f"{self.storage_endpoint}/storage/{file.oid}"}
        return web.Response(status=302, headers=headers | linked | location)

    async def _get_object(self, request: web.Request) -> web.Response:
        return _content(request, self.storage[request.match_info["oid"]], {"Accept-Ranges": "bytes"})


def _content(request: web.Request, data: bytes, headers: dict[str, str]) -> web.Response:
    first = request.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
    if not first.isdigit():
        return web.Response(body=data, headers=headers)
    headers = headers | {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
    return web.Response(status=206, body=data[int(first) :], headers=headers)


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
    return {"type": "file", "oid": sha1(file.oid.encode()).hexdigest(), "size": len(file.data), "path": path, **lfs}


def _card_data(text: str) -> dict[str, Any]:
    front = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    return yaml.safe_load(front) or {}
