"""Folders of a cache that appear under their names as a whole, or not at all."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(cache_dir: Path) -> Iterator[Path]:
    """Make a new folder in the cache, and remove it in the end with whatever it still holds."""
    folder = cache_dir / f"tmp-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_unless_exists(folder: Path, destination: Path) -> None:
    """Give a folder its name, unless another process with the same task was faster."""
    try:
        os.replace(folder, destination)
    except OSError:
        if not destination.is_dir():
            raise


def move_to_content_name(folder: Path, cache_dir: Path, prefix: str) -> Path:
    """Name a folder after its content, so that the same content takes no more disk, and return its new path."""
    content = "".join(f"{path.name} {sha256(path)}\n" for path in sorted(folder.iterdir()))
    destination = cache_dir / f"{prefix}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    move_unless_exists(folder, destination)
    return destination


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
