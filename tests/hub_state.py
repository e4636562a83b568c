"""Contents of the local Hub: files, commits, branches, and the errors that the real one answers with."""

from dataclasses import dataclass
from hashlib import sha1, sha256

from aiohttp import web


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As the Hub names contents: the SHA-256 of a large file, git's SHA-1 of another."""
        git_blob = b"blob %d\0%b" % (len(self.data), self.data)
        return sha256(self.data).hexdigest() if self.lfs else sha1(git_blob).hexdigest()


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        self.answer = web.json_response({"error": message}, status=status, headers=headers)


class Repo:
    """Branches and commits; a commit is the whole content, so it appears at once or not at all."""

    def __init__(self, owner: str, private: bool):
        self.owner, self.private = owner, private
        self.commits: dict[str, dict[str, StoredFile]] = {}
        self.branches: dict[str, str] = {}
        self.titles: list[str] = []
        self.commit("main", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        oid = sha1(f"{len(self.commits)} {sorted((p, f.oid) for p, f in files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str:
        if revision in self.branches:
            return self.branches[revision]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]
