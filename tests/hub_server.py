"""
A Hugging Face Hub on loopback, for tests: users and rights, private repositories with a history, branches, tags and
pull requests, large files on a port of their own, and failures on demand. Everything is kept in memory.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.tokens["ada"])
        api.create_repo("ada/toy", private=True)

Run as a script it serves until it is stopped.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".pth", ".pkl")
LFS_MIN_SIZE = 10 * 2**20  # bytes
LICENSES = ("apache-2.0", "mit", "other")
CARD_METADATA = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)

REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
REPO_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"


class Entry(NamedTuple):
    """A file of a commit, as the Hub lists it. Its bytes are `HubServer.objects[entry.key]`."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        return self.sha256 or self.oid


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    message: str
    user: str
    files: dict[str, Entry]


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def head(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full reference or a commit hash names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubError(Exception):
    """An answer that refuses a request."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.answer = Answer(status, {"error": message, **body}, {"X-Error-Message": message})
        if code is not None:
            self.answer.headers["X-Error-Code"] = code


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    user: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Failure:
    """A failure that waits for its request; `reached` tells that it met it, `release` ends what it holds up."""

    method: str
    pattern: str
    status: int | None
    drop: bool
    hold: bool
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, pattern: str) -> Callable:
    def register(operation: Callable) -> Callable:
        ROUTES.extend((method, re.compile(pattern), operation) for method in methods.split("|"))
        return operation

    return register


class HubServer:
    """
    A Hub with two users, `"ada"` and `"bob"`, whose tokens are `tokens`. Each owns what carries their name; bob also
    reads what is private to ada. `requests` lists the methods and paths of all requests, uploads included.

    Leaving the context raises an `AssertionError` if the server itself failed, or if a token reached the port of the
    large files.

    Args:
        xet_dir (`Path`, *optional*): Folder of the store that clients with Xet write large files to.
    """

    tokens = {"ada": "hf_ada_writes", "bob": "hf_bob_reads"}
    readers = {"ada": {"bob"}, "bob": set()}

    def __init__(self, xet_dir: Path | None = None) -> None:
        self.xet_dir = xet_dir
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (HubHandler, LargeFileHandler)]
        self.endpoint, self.large_file_endpoint = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers
        )

    def __enter__(self) -> "HubServer":
        for server in self.servers:
            server.hub = self
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for failure in self.failures:
            failure.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        assert not self.faults, self.faults

    def environment(self, home: Path, user: str | None = "ada") -> dict[str, str]:
        """The variables of a process that knows this Hub alone, as one of its users; `home` keeps its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.tokens[user] if user is not None else "",
            "HF_HUB_DISABLE_XET": "1" if self.xet_dir is None else "0",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a model repository, as they were committed."""
        return {path: self.objects[entry.key] for path, entry in self.repo(name).head(revision).files.items()}

    def fail_next(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        drop: bool = False,
        hold: bool = False,
        times: int = 1,
    ) -> Failure:
        """
        Lets the next requests of a method fail whose path matches a regular expression.

        Args:
            status (`int`, *optional*): Answer with this HTTP status.
            drop (`bool`): Close the connection after half of the body.
            hold (`bool`): Read half of the body, wait for `release`, then close the connection.
            times (`int`): Number of requests.

        Returns:
            [`Failure`], the last of them: `reached` is set when the request has met it.
        """
        if (status is not None) + drop + hold != 1:
            raise ValueError("exactly one of status, drop and hold must be given")
        failures = [Failure(method, pattern, status, drop, hold) for _ in range(times)]
        with self.lock:
            self.failures += failures
        return failures[-1]

    def take_failure(self, request: Request) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.method == request.method and re.search(failure.pattern, request.path):
                    if not failure.reached.is_set():
                        failure.reached.set()
                        return failure
        return None

    def answer(self, request: Request) -> Answer:
        """The answer to a request that came in at the main port."""
        try:
            request.user = self.user_of(request)
            for method, pattern, operation in ROUTES:
                match = pattern.fullmatch(request.path) if method == request.method else None
                if match is not None:
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    if "name" in arguments:
                        kind = arguments.pop("kind") or "models"
                        arguments["repo"] = self.find(kind, arguments.pop("name"), request.user)
                    with self.lock:
                        return operation(self, request, **arguments)
            raise HubError(501, f"{request.method} {request.path} is not a request that this server knows")
        except HubError as error:
            return error.answer

    def user_of(self, request: Request) -> str | None:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        for user, known in self.tokens.items():
            if token == known:
                return user
        raise HubError(401, "Invalid credentials in Authorization header")

    def find(self, kind: str, name: str, user: str | None) -> Repo:
        repo = self.repos.get((kind, name))
        readers = {repo.owner, *self.readers.get(repo.owner, ())} if repo is not None else ()
        if repo is None or (repo.private and user not in readers):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def check_write(self, repo: Repo, user: str | None) -> None:
        if user != repo.owner:
            raise HubError(403, f"You have no right to write to {repo.name}")

    def add(self, repo: Repo, user: str, title: str, message: str, files: dict[str, Entry], parent: str | None) -> str:
        oid = hashlib.sha1(f"{next(self.numbers)} {repo.name} {title} {files}".encode()).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, message, user, files)
        return oid

    def store(self, data: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.objects[oid] = data
        return Entry(oid, len(data))

    # users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise HubError(401, "Invalid username or password")
        return Answer(body={"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {}}})

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self, request: Request) -> Answer:
        return Answer(body={"standardEnvVars": [], "harnesses": {}})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        if request.user is None:
            raise HubError(401, "Invalid username or password")
        kind = f"{request.json.get('type') or 'model'}s"
        owner = request.json.get("organization") or request.user
        if owner != request.user:
            raise HubError(403, f"You have no right to create a repository under the namespace {owner}")
        name = f"{owner}/{request.json['name']}"
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.repos:
            raise HubError(409, f"You already created this repository: {name}", url=url)
        repo = Repo(kind, name, private=request.json.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": self.store(attributes.encode())}
        repo.refs["refs/heads/main"] = self.add(repo, owner, "initial commit", "", files, None)
        self.repos[kind, name] = repo
        return Answer(body={"url": url, "name": name, "private": repo.private})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request) -> Answer:
        owner = request.json.get("organization") or request.user
        repo = self.find(f"{request.json.get('type') or 'model'}s", f"{owner}/{request.json['name']}", request.user)
        self.check_write(repo, request.user)
        del self.repos[repo.kind, repo.name]
        return Answer(body={})

    @route("PUT", REPO + "/settings")
    def change_settings(self, request: Request, repo: Repo) -> Answer:
        self.check_write(repo, request.user)
        repo.private = request.json["visibility"] == "private"
        return Answer(body={"private": repo.private})

    @route("GET", REPO + r"/auth-check(?P<write>/write)?")
    def check_auth(self, request: Request, repo: Repo, write: str | None) -> Answer:
        if write is not None:
            self.check_write(repo, request.user)
        return Answer(body={})

    # reading

    @route("GET", REPO + rf"(?:/revision{REVISION})?")
    def show_repo(self, request: Request, repo: Repo, revision: str | None) -> Answer:
        commit = repo.head(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if request.query.get("blobs"):
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]]
                sibling |= {"blobId": entry.oid, "size": entry.size}
                if entry.sha256 is not None:
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 127}
        body = {"id": repo.name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}
        return Answer(body=body | self.read_card(commit))

    def read_card(self, commit: Commit) -> dict[str, str]:
        """What the listing of a repository takes from the metadata of its card."""
        card = commit.files.get("README.md")
        match = CARD_METADATA.match(self.objects[card.key].decode()) if card is not None else None
        return dict(re.findall(r"^(library_name|pipeline_tag): (.+)$", match[1], re.MULTILINE)) if match else {}

    @route("GET", REPO + "/refs")
    def list_refs(self, request: Request, repo: Repo) -> Answer:
        def under(prefix: str, name: Callable[[str], str]) -> list[dict]:
            refs = [(ref, oid) for ref, oid in repo.refs.items() if ref.startswith(prefix)]
            return [{"name": name(ref), "ref": ref, "targetCommit": oid} for ref, oid in refs]

        body = {"converts": [], "pullRequests": under("refs/pr/", lambda ref: ref)}
        for key, prefix in (("branches", "refs/heads/"), ("tags", "refs/tags/")):
            body[key] = under(prefix, lambda ref, prefix=prefix: ref.removeprefix(prefix))
        return Answer(body=body)

    @route("GET", REPO + f"/commits{REVISION}")
    def list_commits(self, request: Request, repo: Repo, revision: str) -> Answer:
        commits, oid = [], repo.head(revision).oid
        while oid is not None:
            commit = repo.commits[oid]
            authors = [{"user": commit.user}]
            row = {"id": oid, "title": commit.title, "message": commit.message, "authors": authors}
            commits.append({**row, "date": "2025-01-01T00:00:00.000Z"})
            oid = commit.parent
        return Answer(body=commits)

    def row(self, path: str, entry: Entry) -> dict:
        row = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.sha256 is not None:
            row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 127}
            if entry.sha256 not in self.objects:
                row["xetHash"] = self.xet_hashes()[entry.sha256]
        return row

    @route("GET", REPO + rf"/tree{REVISION}(?:/(?P<path>.+))?")
    def list_tree(self, request: Request, repo: Repo, revision: str, path: str | None) -> Answer:
        prefix = f"{path}/" if path else ""
        files, folders = [], {}
        for name, entry in sorted(repo.head(revision).files.items()):
            if name.startswith(prefix):
                parents = name[len(prefix) :].split("/")[:-1]
                for depth in range(len(parents)):
                    folders[prefix + "/".join(parents[: depth + 1])] = depth
                if not parents or request.query.get("recursive") in ("true", "True", "1"):
                    files.append(self.row(name, entry))
        if path and not files and not folders:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        if request.query.get("recursive") not in ("true", "True", "1"):
            folders = {name: depth for name, depth in folders.items() if depth == 0}
        rows = [
            {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()} for name in folders
        ]
        return Answer(body=rows + files)

    @route("POST", REPO + f"/paths-info{REVISION}")
    def list_paths(self, request: Request, repo: Repo, revision: str) -> Answer:
        files = repo.head(revision).files
        paths = parse_qs(request.body.decode())["paths"]
        return Answer(body=[self.row(path, files[path]) for path in paths if path in files])

    @route("GET|HEAD", REPO_PAGE + rf"/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        commit = repo.head(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            error = HubError(404, f"{path} does not exist", "EntryNotFound")
            error.answer.headers |= headers
            raise error
        entry = commit.files[path]
        headers["ETag"] = f'"{entry.key}"'
        if entry.sha256 is None:
            return ranged(request, self.objects[entry.key], headers)
        if entry.sha256 not in self.objects:
            headers["X-Xet-Hash"] = self.xet_hashes()[entry.sha256]
            token_url = f"{self.endpoint}/api/{repo.kind}/{repo.name}/xet-read-token/{commit.oid}"
            headers["Link"] = f'<{token_url}>; rel="xet-auth"'
        headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        headers["Location"] = f"{self.large_file_endpoint}/{entry.sha256}"
        return Answer(302, b"", headers)

    # writing

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> Answer:
        match = CARD_METADATA.match(request.json["content"])
        warnings = [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
        for name in re.findall(r"^license: (.+)$", match.group(1), re.MULTILINE) if match else ():
            if name not in LICENSES:
                message = f'"license" must be one of [{", ".join(LICENSES)}]'
                raise HubError(400, message, errors=[{"message": message}], warnings=warnings)
        return Answer(body={"errors": [], "warnings": warnings})

    @route("POST", REPO + f"/preupload{REVISION}")
    def preupload(self, request: Request, repo: Repo, revision: str) -> Answer:
        if not request.query.get("create_pr"):
            self.check_write(repo, request.user)
        published = repo.head(revision).files
        files = []
        for file in request.json["files"]:
            is_large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_MIN_SIZE
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if file["path"] in published:
                answer["oid"] = published[file["path"]].key
            files.append(answer)
        return Answer(body={"files": files})

    @route("POST", REPO_PAGE + r"\.git/info/lfs/objects/batch")
    def batch(self, request: Request, repo: Repo) -> Answer:
        if request.user is None:
            raise HubError(401, "Authentication is required to upload")
        objects = []
        for wanted in request.json["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                verify = f"{self.endpoint}/{repo.name}.git/info/lfs/verify"
                upload = f"{self.large_file_endpoint}/{wanted['oid']}"
                row["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(row)
        return Answer(body={"transfer": "basic", "objects": objects})

    @route("POST", REPO_PAGE + r"\.git/info/lfs/verify")
    def verify(self, request: Request, repo: Repo) -> Answer:
        if len(self.objects.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(422, f"{request.json['oid']} was not uploaded")
        return Answer(body={})

    @route("POST", REPO + f"/commit{REVISION}")
    def commit(self, request: Request, repo: Repo, revision: str) -> Answer:
        as_pull_request = bool(request.query.get("create_pr"))
        if request.user is None:
            raise HubError(401, "Invalid username or password")
        if not as_pull_request:
            self.check_write(repo, request.user)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        ref = revision if revision in repo.refs else f"refs/heads/{revision}"
        parent = repo.head(header.get("parentCommit") or revision) if as_pull_request else repo.head(ref)
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self.apply(line["key"], line["value"], files)
        if as_pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
        oid = self.add(repo, request.user, header["summary"], header["description"], files, parent.oid)
        repo.refs[ref] = oid
        url = f"{self.endpoint}/{repo.name}"
        body = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        if as_pull_request:
            body["pullRequestUrl"] = f"{url}/discussions/{number}"
        return Answer(body=body)

    def apply(self, key: str, value: dict, files: dict[str, Entry]) -> None:
        """One line of a commit: changes `files`, or refuses the whole commit."""
        path = value["path"]
        if key == "file":
            files[path] = self.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            sha256 = value["oid"]
            if sha256 not in self.objects and sha256 not in self.xet_hashes():
                raise HubError(400, f"{path}: {sha256} was not uploaded")
            size = value.get("size") or len(self.objects[sha256])
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            files[path] = self.store(pointer)._replace(size=size, sha256=sha256)
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not doomed:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise HubError(400, f"{key} is not an operation of a commit")

    @route("POST|DELETE", REPO + r"/(?P<ref>branch|tag)/(?P<revision>[^/]+)")
    def change_ref(self, request: Request, repo: Repo, ref: str, revision: str) -> Answer:
        """The path names the new branch, which begins at `startingPoint`, or what the tag of the body marks."""
        self.check_write(repo, request.user)
        body = request.json if request.body else {}
        name = body["tag"] if ref == "tag" and request.method == "POST" else revision
        full_name = f"refs/{'heads' if ref == 'branch' else 'tags'}/{name}"
        if request.method == "DELETE":
            if repo.refs.pop(full_name, None) is None:
                raise HubError(404, f"{name} does not exist", "RevisionNotFound")
            return Answer(body={})
        if full_name in repo.refs:
            raise HubError(409, f"Reference already exists: {name}")
        start = revision if ref == "tag" else body.get("startingPoint") or "main"
        repo.refs[full_name] = repo.head(start).oid
        return Answer(201, {})

    # Xet

    @route("GET", REPO + rf"/xet-(?:read|write)-token{REVISION}")
    def show_xet_token(self, request: Request, repo: Repo, revision: str) -> Answer:
        if self.xet_dir is None:
            raise HubError(404, "This Hub has no Xet store")
        expires = int(time.time()) + 3600
        url = f"local://{self.xet_dir.resolve()}"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Answer(body={"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    def xet_hashes(self) -> dict[str, str]:
        """SHA-256 -> Xet hash of the files in the Xet store, read from its shards."""
        if self.xet_dir is None:
            return {}
        shards = self.xet_dir.rglob("*.mdb")
        return {sha256: xet_hash for shard in shards for sha256, xet_hash in files_of_shard(shard.read_bytes())}


def files_of_shard(data: bytes) -> Iterator[tuple[str, str]]:
    """
    The SHA-256 and the Xet hash of each file that a shard of the Xet store lists. A shard is made of records of 48
    bytes: a header; then for each file its hash, flags and number of segments, the segments (and as many records of
    verification), and its SHA-256. Hashes are four little-endian words.
    """
    has_verification, has_sha256 = 1 << 31, 1 << 30
    place = 48
    while data[place : place + 32] != b"\xff" * 32:
        flags, num_segments = struct.unpack_from("<II", data, place + 32)
        xet_hash, place = hash_hex(data, place), place + 48 * (1 + num_segments)
        if flags & has_verification:
            place += 48 * num_segments
        if flags & has_sha256:
            yield hash_hex(data, place), xet_hash
            place += 48


def hash_hex(data: bytes, place: int) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data, place))


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The bytes that the request asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if match is None:
        return Answer(200, data, headers)
    start, end = int(match[1]), int(match[2] or len(data) - 1)
    if start >= len(data):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    part = data[start : end + 1]
    return Answer(206, part, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle_request(self) -> None:
        hub: HubServer = self.server.hub
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        request = Request(self.command, parts.path, query, self.headers, b"")
        hub.requests.append((request.method, parts.path))
        failure = hub.take_failure(request)
        length = int(self.headers.get("Content-Length") or 0)
        if failure is not None and failure.status is None:
            self.rfile.read(length // 2)
            if failure.hold:
                failure.release.wait()
            self.close_connection = True
            return
        request.body = self.rfile.read(length)
        if failure is not None:
            answer = HubError(failure.status, f"injected failure {failure.status}").answer
        elif len(request.body) < length:
            self.close_connection = True
            return
        else:
            try:
                answer = self.answer(hub, request)
            except Exception as error:
                hub.faults.append(f"{request.method} {self.path}: {error!r}")
                answer = HubError(501, repr(error)).answer
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if not isinstance(answer.body, bytes):
            answer.headers.setdefault("Content-Type", "application/json")
        with contextlib.suppress(ConnectionError):  # the client may be gone
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, quote(value, safe=" !\"#$%&'()*+,/:;<=>?@[]^_`{|}~"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class HubHandler(Handler):
    def answer(self, hub: HubServer, request: Request) -> Answer:
        return hub.answer(request)


class LargeFileHandler(Handler):
    """The bytes of large files, by their SHA-256, on a port of their own: no token may arrive here."""

    def answer(self, hub: HubServer, request: Request) -> Answer:
        sha256 = request.path.removeprefix("/")
        if request.headers.get("Authorization"):
            hub.faults.append(f"a token reached {request.method} {request.path} on the port of large files")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != sha256:
                return Answer(400, b"the bytes do not match their SHA-256")
            hub.objects[sha256] = request.body
            return Answer(200, b"")
        return ranged(request, hub.objects[sha256], {}) if sha256 in hub.objects else Answer(404, b"")


if __name__ == "__main__":
    with HubServer() as server:
        print(f"export HF_ENDPOINT={server.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN={server.tokens['ada']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
