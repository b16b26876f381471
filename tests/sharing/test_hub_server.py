"""The real client against the Hub on loopback."""

import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import threading
import urllib.error
import urllib.request

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from hub_server import HubServer


WEIGHTS = bytes(range(256)) * 300


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.tokens["ada"])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "results").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Toy\n")
    (path / "results" / "one.json").write_text("{}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


@pytest.fixture
def toy(api, folder):
    """A private repository with one commit on top of the first."""
    api.create_repo("ada/toy", private=True)
    api.upload_folder(repo_id="ada/toy", folder_path=folder)
    return "ada/toy"


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def status_of(call, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    return error.value.response.status_code


def uploads(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_what_goes_up_comes_down(hub, api, toy, folder, tmp_path):
    assert hub.files(toy).keys() == {".gitattributes", "README.md", "model.safetensors", "results/one.json"}
    assert uploads(hub) == [f"/{hashlib.sha256(WEIGHTS).hexdigest()}"]
    copy = snapshot_download(toy, endpoint=hub.endpoint, token=api.token, local_dir=tmp_path / "copy")
    for name in ("README.md", "model.safetensors", "results/one.json"):
        with open(f"{copy}/{name}", "rb") as file:
            assert file.read() == (folder / name).read_bytes()
    assert not api.verify_repo_checksums(toy, local_dir=copy).mismatches


def test_listings(api, toy):
    info = api.model_info(toy, files_metadata=True)
    weights = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert info.private and info.sha == api.list_repo_commits(toy)[0].commit_id
    assert weights.size == len(WEIGHTS) and weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert {entry.path for entry in api.list_repo_tree(toy)} == {
        ".gitattributes", "README.md", "model.safetensors", "results"
    }  # fmt: skip
    assert [entry.path for entry in api.list_repo_tree(toy, path_in_repo="results")] == ["results/one.json"]
    assert [file.path for file in api.get_paths_info(toy, ["nothing", "README.md"])] == ["README.md"]
    assert [commit.title for commit in api.list_repo_commits(toy)] == [
        "Upload folder using huggingface_hub", "initial commit"
    ]  # fmt: skip


def test_unchanged_files_make_no_commit(hub, api, toy, folder):
    head = api.model_info(toy).sha
    assert api.upload_folder(repo_id=toy, folder_path=folder).oid == head
    assert len(hub.repo(toy).commits) == 2 and len(uploads(hub)) == 1


def test_rights(hub, api, toy, folder):
    bob = HfApi(endpoint=hub.endpoint, token=hub.tokens["bob"])
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    assert bob.whoami()["name"] == "bob" and bob.model_info(toy).id == toy
    for call in (bob.upload_folder, bob.delete_folder):
        arguments = {"folder_path": folder} if call == bob.upload_folder else {"path_in_repo": "results"}
        assert status_of(call, repo_id=toy, **arguments) == 403
    assert status_of(bob.auth_check, toy, write=True) == status_of(bob.create_repo, "ada/other") == 403
    bob.create_repo("bob/secret", private=True)
    for reader, status in ((stranger, 401), (api, 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            reader.model_info("bob/secret")
        assert error.value.response.status_code == status
    assert status_of(HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info, toy) == 401
    api.update_repo_settings(toy, private=False)
    assert stranger.model_info(toy).private is False
    assert not stranger.repo_exists("ada/nothing")
    assert len(hub.repo(toy).commits) == 2


def test_a_repository_is_created_once_and_deleted(hub, api, toy):
    assert status_of(api.create_repo, toy) == 409
    assert api.create_repo(toy, exist_ok=True).repo_id == toy
    api.delete_repo(toy)
    assert not api.repo_exists(toy) and not hub.repos


def test_branches_tags_and_pull_requests(hub, api, toy):
    first, second = (commit.commit_id for commit in reversed(api.list_repo_commits(toy)))
    api.create_branch(toy, branch="feat/x", revision=first)
    api.create_tag(toy, tag="v1")
    assert status_of(api.create_tag, toy, tag="v1") == status_of(api.create_branch, toy, branch="feat/x") == 409
    add = [CommitOperationAdd("new.txt", b"new")]
    on_branch = api.create_commit(toy, add, commit_message="branch", revision="feat/x").oid
    bob = HfApi(endpoint=hub.endpoint, token=hub.tokens["bob"])
    proposal = bob.create_commit(toy, [CommitOperationAdd("new.txt", b"new")], commit_message="pr", create_pr=True)
    assert proposal.pr_revision == "refs/pr/1" and proposal.pr_url.endswith("/discussions/1")
    refs = api.list_repo_refs(toy, include_pull_requests=True)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": second, "feat/x": on_branch}
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v1": second}
    assert refs.pull_requests[0].target_commit == proposal.oid
    assert "new.txt" in hub.files(toy, "feat/x") and "new.txt" in hub.files(toy, "refs/pr/1")
    assert "new.txt" not in hub.files(toy)
    api.delete_tag(toy, tag="v1")
    api.delete_branch(toy, branch="feat/x")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(toy, revision="feat/x")


def test_a_commit_on_top_of_an_old_one_is_refused(hub, api, toy):
    old = api.list_repo_commits(toy)[-1].commit_id
    add = [CommitOperationAdd("new.txt", b"new")]
    assert status_of(api.create_commit, toy, add, commit_message="late", parent_commit=old) == 412
    assert "new.txt" not in hub.files(toy)


def test_files_are_deleted_and_what_is_missing_is_missing(hub, api, toy):
    delete = [CommitOperationDelete("results/"), CommitOperationDelete("README.md")]
    api.create_commit(toy, delete, commit_message="delete")
    assert hub.files(toy).keys() == {".gitattributes", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(toy, "README.md")


def test_a_card_that_the_hub_refuses_stops_everything(hub, api, toy, folder):
    (folder / "README.md").write_text("---\nlicense: unheard-of\n---\n")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="license"):
        api.upload_folder(repo_id=toy, folder_path=folder)
    assert len(uploads(hub)) == 1 and len(hub.repo(toy).commits) == 2


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500])
def test_an_injected_status_reaches_the_client_once(hub, api, toy, status):
    hub.fail_next("POST", "/commit/", status=status)
    add = [CommitOperationAdd("new.txt", b"new")]
    assert status_of(api.create_commit, toy, add, commit_message="new") == status
    assert "new.txt" not in hub.files(toy)
    api.create_commit(toy, [CommitOperationAdd("new.txt", b"new")], commit_message="new")
    assert hub.files(toy)["new.txt"] == b"new"


def test_a_dropped_upload_is_sent_again(hub, api, toy, folder, no_waiting):
    (folder / "model.safetensors").write_bytes(WEIGHTS * 20)
    failure = hub.fail_next("PUT", r"^/[0-9a-f]{64}$", drop=True)
    api.upload_folder(repo_id=toy, folder_path=folder)
    assert failure.reached.is_set() and len(uploads(hub)) == 3
    assert hub.files(toy)["model.safetensors"] == WEIGHTS * 20


def test_an_upload_that_is_always_dropped_makes_no_commit(hub, api, toy, folder, no_waiting):
    (folder / "model.safetensors").write_bytes(WEIGHTS * 20)
    hub.fail_next("PUT", r"^/[0-9a-f]{64}$", drop=True, times=6)
    with pytest.raises(RuntimeError, match="model.safetensors"):
        api.upload_folder(repo_id=toy, folder_path=folder)
    assert hub.files(toy)["model.safetensors"] == WEIGHTS and len(hub.repo(toy).commits) == 2


def test_bytes_that_do_not_match_their_hash_are_refused(hub, api, toy):
    operation = CommitOperationAdd("other.safetensors", WEIGHTS[::-1])
    operation.upload_info.sha256 = hashlib.sha256(b"something else").digest()
    with pytest.raises(RuntimeError, match="other.safetensors"):
        api.create_commit(toy, [operation], commit_message="forged")
    assert "other.safetensors" not in hub.files(toy)


def test_a_held_upload_waits(hub, api, toy, no_waiting):
    failure = hub.fail_next("PUT", ".", hold=True)
    operation = CommitOperationAdd("other.safetensors", WEIGHTS * 2)
    thread = threading.Thread(target=api.create_commit, args=(toy, [operation]), kwargs={"commit_message": "slow"})
    thread.start()
    assert failure.reached.wait(1_800) and "other.safetensors" not in hub.files(toy)
    failure.release.set()
    thread.join()
    assert hub.files(toy)["other.safetensors"] == WEIGHTS * 2


def test_a_token_on_the_port_of_large_files_fails_the_test():
    with pytest.raises(AssertionError, match="a token reached GET /ab"):
        with HubServer() as hub:
            headers = {"Authorization": f"Bearer {hub.tokens['ada']}"}
            request = urllib.request.Request(f"{hub.large_file_endpoint}/ab", headers=headers)
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request)


def xet_round_trip(endpoint, token, home, connection):
    """In a process of its own: what huggingface_hub read from the environment can not be changed for hf_xet."""
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo("ada/toy")
    api.create_commit("ada/toy", [CommitOperationAdd("w.safetensors", WEIGHTS)], commit_message="by Xet")
    with open(api.hf_hub_download("ada/toy", "w.safetensors", cache_dir=home), "rb") as file:
        connection.send(file.read() == WEIGHTS)


# In this version, and for its own tests, hf_xet can keep its store in a folder.
XET_VERSION = "1.8.0"


@pytest.mark.skipif(
    importlib.util.find_spec("hf_xet") is None or importlib.metadata.version("hf_xet") != XET_VERSION,
    reason=f"hf_xet {XET_VERSION} is not installed: adapt HubServer.xet_hashes to a new version",
)
def test_xet(tmp_path, monkeypatch):
    with HubServer(xet_dir=tmp_path / "store") as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        arguments = (hub.endpoint, hub.tokens["ada"], tmp_path / "cache", sender)
        process = multiprocessing.get_context("spawn").Process(target=xet_round_trip, args=arguments)
        process.start()
        process.join(1_800)
        assert process.exitcode == 0 and receiver.recv() and not uploads(hub)
        assert hub.repo("ada/toy").head("main").files["w.safetensors"].sha256 not in hub.objects
