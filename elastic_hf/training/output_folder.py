"""The folder of a run: whether it can be written to, and its lock."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


# The file that is locked. It stays: where it is, a run has been.
LOCK = ".lock"


def make_folder(folder: str | os.PathLike, field: str) -> None:
    """Make a folder that can be written to, or raise a `ValueError` that names the `field` it comes from."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{field} {folder} must be a folder that can be written to: {error}") from error


@contextmanager
def lock_output_dir(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder. The system releases the lock when the process ends, however it ends.

    The process that holds the lock may take it again.

    Raises:
        ValueError: If another run holds the lock.
    """
    lock = FileLock(Path(output_dir, LOCK), timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output_dir {output_dir} is in use by another run: choose another one, or wait until that run has ended"
        ) from error
    try:
        yield
    finally:
        lock.release()
