"""What a run leaves behind that is killed at a file operation, or that finds the disk full from one of them on."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers import TokenizersBackend


# All that changes files: in Python, and what libraries write past it.
OPERATIONS = (
    (builtins, "open"),
    (io, "open"),
    *((os, name) for name in ("mkdir", "replace", "rename", "remove", "unlink", "rmdir", "truncate")),
    (torch, "save"),
    (safetensors.torch, "serialize_file"),
    (pq, "write_table"),
    (TokenizersBackend, "_save_pretrained"),
)
OPEN, MAKE_FOLDER = io.open, os.mkdir
# These need no space.
FREE = (os.replace, os.rename, os.remove, os.unlink, os.rmdir, os.truncate)
PAGE = 4096

State = dict[str, bytes | None]


def read_state(folder: Path) -> State:
    """Return all files of a folder with their contents, and its folders with None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def write_state(state: State, folder: Path) -> Path:
    """Make a folder what it was."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    return folder


def read_inodes(folder: Path) -> dict[int, bytes]:
    return {path.stat().st_ino: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written_files(folder: Path, before: dict[int, bytes]) -> list[str]:
    """Return the files that were written since the inodes were read; one that was renamed was not."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if before.get(path.stat().st_ino) != path.read_bytes()]


def torn(content: bytes) -> bytes:
    """Return what is on the disk of a file that is being written: half of its pages, of a small file nothing."""
    return content[: len(content) // 2 // PAGE * PAGE]


def states_after_kills(folder: Path, run: Callable[[], None]) -> list[State]:
    """Run to the end, and return what a kill would have left at each file operation and within it."""
    states, inodes = [read_state(folder)], read_inodes(folder)

    def look() -> None:
        nonlocal inodes
        before, now = states[-1], read_state(folder)
        for name in written_files(folder, inodes):
            states.append({**before, name: torn(now[name])})
            before = {**before, name: now[name]}
        states.append(now)
        inodes = read_inodes(folder)

    def watched(operation: Callable) -> Callable:
        def call(*args, **kwargs):
            look()
            return operation(*args, **kwargs)

        return call

    with _replaced(watched):
        run()
    look()
    # Folders come before what is in them.
    unique = {tuple(sorted(state.items())): dict(sorted(state.items())) for state in states}
    return [*unique.values()]


def state_after_full_disk(folder: Path, run: Callable[[], None], num_writes: int) -> State | None:
    """Run on a disk that is full after a number of writes; return what is left, or None if there are no more writes.

    The run must end with the error.
    """
    count = 0

    def is_full() -> bool:
        nonlocal count
        count += 1
        return count > num_writes

    def writes(operation: Callable, path, mode: str = "r", *args, **kwargs) -> bool:
        is_inside = isinstance(path, str | Path) and Path(path).absolute().is_relative_to(folder)
        return is_inside and (operation is MAKE_FOLDER or bool(set(mode) & set("wax+")))

    def full(operation: Callable) -> Callable:
        def call(*args, **kwargs):
            if operation in (OPEN, MAKE_FOLDER):
                if writes(operation, *args, **kwargs) and is_full():
                    if operation is OPEN and not Path(args[0]).is_dir():
                        OPEN(args[0], "wb").close()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
                return operation(*args, **kwargs)
            if operation in FREE:
                return operation(*args, **kwargs)
            before = read_inodes(folder)
            result = operation(*args, **kwargs)
            written = written_files(folder, before)
            if written and is_full():
                for name in written:
                    (folder / name).write_bytes(torn((folder / name).read_bytes()))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), written[0])
            return result

        return call

    with _replaced(full):
        try:
            run()
        except (OSError, ValueError) as error:
            assert os.strerror(errno.ENOSPC) in str(error)
            return read_state(folder)
    assert count <= num_writes, "the run did not notice that the disk was full"
    return None


@contextmanager
def _replaced(wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, _without_itself(wrap, getattr(owner, name)))
        yield


def _without_itself(wrap: Callable[[Callable], Callable], operation: Callable) -> Callable:
    """Return the wrapped operation, which leaves alone what the watching itself does to files."""
    wrapped = wrap(operation)

    def call(*args, **kwargs):
        if _busy:
            return operation(*args, **kwargs)
        _busy.append(True)
        try:
            return wrapped(*args, **kwargs)
        finally:
            _busy.clear()

    return call


_busy: list[bool] = []
