"""Folders of a cache that appear under their names whole or not at all, and are mended where damaged."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


CHECKSUMS_FILE = "SHA256SUMS"


@contextmanager
def temporary_folder(cache_dir: Path) -> Iterator[Path]:
    """Make a new folder in the cache, and remove it in the end with whatever it still holds."""
    folder = cache_dir / f"tmp-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_to_content_name(folder: Path, cache_dir: Path, prefix: str) -> Path:
    """Name a folder after its content, so that the same content takes no more disk, and return its new path."""
    destination = cache_dir / f"{prefix}-{hashlib.sha256(checksums(folder).encode()).hexdigest()[:32]}"
    move_folder(folder, destination)
    return destination


def move_folder(folder: Path, destination: Path) -> None:
    """Give a folder its name; where that is taken, replace the files that are missing or differ."""
    try:
        os.replace(folder, destination)
    except OSError:
        if not destination.is_dir():
            raise
        for path in folder.iterdir():
            existing = destination / path.name
            if not existing.is_file() or sha256(existing) != sha256(path):
                os.replace(path, existing)


def write_checksums(folder: Path) -> None:
    """Write down what the files of a folder hold, for [`is_whole`]."""
    (folder / CHECKSUMS_FILE).write_text(checksums(folder))


def is_whole(folder: Path) -> bool:
    """Return whether the files of a folder are as they were written down."""
    file = folder / CHECKSUMS_FILE
    return file.is_file() and file.read_text() == checksums(folder)


def checksums(folder: Path) -> str:
    """Return a line with the SHA-256 and the name of each file of a folder."""
    paths = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS_FILE)
    return "".join(f"{sha256(path)}  {path.name}\n" for path in paths)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
