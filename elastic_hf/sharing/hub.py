"""Publishing: one commit that holds a trained model, all that loads it, and what was measured."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from .repository import files_to_publish


class PublishError(OSError):
    """Says what kept a folder from being published, in one line that holds no token."""


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    include_personal_data: bool = False,
    commit_message: str = "Publish the model",
    token: str | None = None,
    endpoint: str | None = None,
) -> CommitInfo | None:
    """Publish a trained model on the Hub, in one commit.

    The model is loaded and tried first. The commit holds [`files_to_publish`], with a card rendered for `repo_id` from
    the folder's `all_results.json`, or its `README.md` where there are no results; other files of the repository stay
    as they are. It is made after all bytes have arrived, and only on top of the commit that was the latest one at the
    beginning: an upload that is refused or interrupted leaves the repository as it was. A repository that does not
    exist is created first.

    Args:
        folder (`str` or `Path`): An output folder of `elastic-hf train`, or of
            [`SequentialRecommendationTrainer`].
        repo_id (`str`): `"namespace/name"` of the model repository.
        private (`bool`, *optional*): Whether only its owner can see a new repository. The namespace's own setting by
            default. An existing repository must be what is asked for.
        revision (`str`, *optional*): Branch to commit to, which must exist. `"main"` by default.
        tag (`str`, *optional*):
            Name for this version, made after the commit. The card's code asks for it by this name.
        create_pr (`bool`): Propose the commit as a pull request against `"main"`.
        license (`str`, *optional*): Hub id of the licence of the weights, such as `"mit"`, for the card.
        include_personal_data (`bool`, defaults to `False`):
            Publish results files as they are, with the user whom they show (id, history and next item) and the paths
            of this machine.
        commit_message (`str`): First line of the commit's message.
        token (`str`, *optional*): Token with write access. The one of `HF_TOKEN` or `hf auth login` by default.
        endpoint (`str`, *optional*): Address of the Hub. `HF_ENDPOINT` by default.

    Returns:
        `CommitInfo`, or `None` where the repository already holds all that would be published.

    Raises:
        ValueError: if the folder or an argument is not what it must be. Nothing is sent.
        [`PublishError`]: if the Hub, or the way to it, refuses.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id):
        raise ValueError(f"repo_id must be namespace/name, found {repo_id!r}")
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("create_pr proposes a commit to main: it goes with neither revision nor tag")
    operations = files_to_publish(folder, repo_id, license, tag=tag, include_personal_data=include_personal_data)
    token = token or get_token()
    if not token:
        raise PublishError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    for operation in operations:
        if not operation.path_in_repo.endswith((".safetensors", ".parquet", ".png")):
            with operation.as_file() as file:
                if token.encode() in file.read():
                    raise ValueError(f"{operation.path_in_repo} must not hold the token, which everyone could read")

    return _commit(
        HfApi(endpoint=endpoint, token=token),
        repo_id,
        operations,
        private=private,
        revision=revision or "main",
        tag=tag,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def _commit(
    api: HfApi,
    repo_id: str,
    operations: list[CommitOperationAdd],
    *,
    private: bool | None,
    revision: str,
    tag: str | None,
    create_pr: bool,
    commit_message: str,
) -> CommitInfo | None:
    """The commit of all operations on top of the latest one, and its tag."""
    token = api.token
    unchanged = f"{repo_id} is as it was"
    with _in_one_line(token, unchanged):
        try:
            is_private = api.repo_info(repo_id).private
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
            is_private = private
        refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    if private is not None and is_private != private:
        raise ValueError(f"private is {private}, but {repo_id} exists and is {'private' if is_private else 'public'}")
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    heads |= {pull_request.ref: pull_request.target_commit for pull_request in refs.pull_requests}
    if revision not in heads:
        raise ValueError(f"revision must be a branch of {repo_id} ({', '.join(heads)}), found {revision!r}")
    head = heads[revision]
    with _in_one_line(token, unchanged):
        is_new = not _holds(api, repo_id, head, operations)
    tagged = {tag.name: tag.target_commit for tag in refs.tags}.get(tag)
    if tagged is not None and (is_new or tagged != head):
        raise ValueError(f"tag {tag!r} exists and marks another version, {tagged}: choose another tag")

    commit = None
    if is_new:
        in_doubt = f"{repo_id} is as it was or holds all of it, publish again to know"
        with _in_one_line(token, unchanged, in_doubt), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                revision=None if create_pr else revision,
                create_pr=create_pr,
                parent_commit=head,
            )
    if tag is not None and tagged is None:
        version = commit.oid if commit is not None else head
        with _in_one_line(token, f"{repo_id} holds this model as {version}, without the tag {tag!r}"):
            api.create_tag(repo_id, tag=tag, revision=version)
    return commit


def _holds(api: HfApi, repo_id: str, revision: str, operations: list[CommitOperationAdd]) -> bool:
    """Whether the repository holds each of the files already, byte for byte."""
    paths = [operation.path_in_repo for operation in operations]
    published = {file.path: file for file in api.get_paths_info(repo_id, paths, revision=revision)}
    for operation in operations:
        file = published.get(operation.path_in_repo)
        if file is None:
            return False
        if file.lfs is not None:
            is_same = file.lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            with operation.as_file() as content:
                is_same = file.blob_id == git_hash(content.read())
        if not is_same:
            return False
    return True


@contextmanager
def _in_one_line(token: str, outcome: str, in_doubt: str | None = None) -> Iterator[None]:
    """
    Turn whatever goes wrong into a [`PublishError`] of one line: the reason and the outcome, never the token. Without
    a clear refusal, the answer to what was done may have been lost: the outcome is `in_doubt`.
    """
    try:
        yield
    except Exception as error:
        is_refused = isinstance(error, RuntimeError | ValueError) or 400 <= _status(error) < 500
        outcome = outcome if is_refused else in_doubt or outcome
        raise PublishError(f"{_reason(error).replace(token, '***')}: {outcome}") from error


def _status(error: Exception) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0


def _reason(error: Exception) -> str:
    status = _status(error)
    if status == 401:
        return "the Hub does not know the token (401): log in again with `hf auth login`"
    if status == 403:
        return "the token has no right to write here (403)"
    if status in (409, 412):
        return (
            f"another change came first ({status}, {error.server_message}): look at the repository and publish again"
        )
    if status == 429:
        return "the Hub has had too many requests (429): try again later"
    if status >= 500:
        return f"the Hub has failed ({status}): try again later"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{error} {_reason(error.__cause__)}"  # an upload, and what went wrong with it
    text = getattr(error, "server_message", None) or str(error)
    return f"{type(error).__name__}: " + " ".join(text.split())
