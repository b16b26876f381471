"""Files of this machine, or of an object store that PyArrow reads: `s3://`, `gs://`, `abfss://`, `hdfs://`."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from elastic_hf.results import format_json, parse_json, written_whole
from elastic_hf.training.output_folder import lock_output_dir, make_folder


class File(NamedTuple):
    """A file as it was found; unlike PyArrow's `FileInfo` it can be sent to other processes."""

    path: str
    size: int
    mtime_ns: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix


def is_uri(place: str) -> bool:
    return "://" in place


def absolute(place: str) -> str:
    """Return a name of the place that means the same to a process with another working directory."""
    return place if is_uri(place) else str(Path(place).resolve())


def find_place(place: str, field: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    Raises:
        ValueError: if it is the URI of no file system that PyArrow knows, or holds a secret; the message names the
            `field`.
    """
    if not is_uri(place):
        return fs.LocalFileSystem(), absolute(place)
    if urlsplit(place).password is not None:
        raise ValueError(f"{field} must be a URI without a secret, which belongs in the environment, found one")
    try:
        return fs.FileSystem.from_uri(place)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{field} must be a path, or a URI that PyArrow reads, found {place!r}: {error}") from error


def list_files(filesystem: fs.FileSystem, path: str) -> list[File]:
    """Return the file of a path, or all files below a folder in the order of their paths, but for hidden ones: those
    with a name, or in a folder with one, that begins with `.` or `_`."""
    found = [filesystem.get_file_info(path)]
    if found[0].type == fs.FileType.Directory:
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = {PurePosixPath(info.path): info for info in found if info.type == fs.FileType.File}
    shown = [name for name in files if not any(part[0] in "._" for part in name.relative_to(path).parts)]
    return [File(files[name].path, files[name].size, files[name].mtime_ns) for name in sorted(shown)]


class Folder:
    """
    A folder whose files appear when they are whole.

    Args:
        place (`str`): Its path or URI.
        field (`str`): What errors call it.

    Raises:
        ValueError: as [`find_place`].
    """

    def __init__(self, place: str, field: str) -> None:
        self.place, self.field = absolute(place), field
        self.filesystem, self.path = find_place(place, field)

    def make(self) -> None:
        """Make the folder, or raise a `ValueError` that says why it cannot be written to."""
        if not is_uri(self.place):
            make_folder(self.place, self.field)
            return
        try:
            self.filesystem.create_dir(self.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.field} {self.place} must be a folder that can be written to: {error}") from error

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs out of a folder of this machine; an object store has no locks."""
        return nullcontext() if is_uri(self.place) else lock_output_dir(self.path)

    def names(self) -> list[str]:
        """Return the names of its files, of none where there is no folder."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def has(self, name: str) -> bool:
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.File

    @contextmanager
    def written_whole(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to write to that takes the place of an older one when it is whole, and is absent otherwise."""
        if not is_uri(self.place):
            with written_whole(Path(self.path, name)) as stream:
                yield stream
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            with open(file, "wb") as stream:
                yield stream
            there = f"{self.path}/{name}"
            fs.copy_files(str(file), there, fs.LocalFileSystem(), self.filesystem)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return parse_json(stream.read(), f"{self.place}/{name}")

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        text = format_json(values, f"{self.place}/{name}")
        with self.written_whole(name) as stream:
            stream.write(text)

    def touch(self, name: str) -> None:
        """Write an empty file."""
        with self.written_whole(name):
            pass
