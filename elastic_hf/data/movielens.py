"""The releases of MovieLens: where they are, how their files are divided, and their titles."""

import shutil
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .cache import is_whole, move_folder, sha256, temporary_folder, write_checksums
from .encoding import TEXT_ID
from .text_reader import TextLayout


MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens"

# SHA-256 of the archives at MOVIELENS_URL.
MOVIELENS_SHA256 = {
    "ml-100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "ml-1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "ml-20m": "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    "ml-25m": "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    "ml-latest-small": "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
}


class MovieLensLayout(NamedTuple):
    """The files of a release that hold the interactions and the titles."""

    ratings: str
    movies: str
    text: TextLayout


MOVIELENS_LAYOUTS = (
    MovieLensLayout("u.data", "u.item", TextLayout("\t", ["user_id", "item_id", "rating", "timestamp"], False)),
    # Every field is a number, so `::` can be read as an empty field between two colons.
    MovieLensLayout(
        "ratings.dat",
        "movies.dat",
        TextLayout(":", ["user_id", "empty_1", "item_id", "empty_2", "rating", "empty_3", "timestamp"], False),
    ),
    MovieLensLayout("ratings.csv", "movies.csv", TextLayout()),
)


# The files of the releases with names that would be read from any other folder.
RELEASE_FILES = {
    "README.txt",
    "genome-scores.csv",
    "genome-tags.csv",
    "links.csv",
    "movies.csv",
    "ratings.csv",
    "tags.csv",
}


def find_layout(folder: Path) -> MovieLensLayout | None:
    """Return the layout of a folder with the raw files of a release, None if it is no such folder."""
    for layout in MOVIELENS_LAYOUTS:
        if (folder / layout.ratings).is_file() and (folder / layout.movies).is_file():
            return layout
    return None


def read_movies(path: Path) -> pa.Table | None:
    """Read `u.item` or `movies.dat` into a table with the columns `item` and `title`; None for any other file."""
    separator = {"u.item": "|", "movies.dat": "::"}.get(path.name)
    if separator is None or not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")  # the 10M release
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # the older ones
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    fields = pc.split_pattern(pa.array(lines), separator, max_splits=2)
    short = np.flatnonzero(pc.less(pc.list_value_length(fields), 2))
    if short.size:
        raise ValueError(f"{path}, line {short[0] + 1}: expected an id and a title divided by {separator!r}")
    ids = pc.list_element(fields, 0).cast(TEXT_ID)
    return pa.table({"item": pa.chunked_array([ids]), "title": pc.list_element(fields, 1)})


def download_movielens(name: str, cache_dir: Path) -> Path:
    """Download and unpack a release, unless the cache has it whole, and return its folder."""
    folder = cache_dir / name
    if is_whole(folder):
        return folder
    url = f"{MOVIELENS_URL}/{name}.zip"
    with temporary_folder(cache_dir) as temporary:
        archive = temporary / "archive.zip"
        _download(url, archive)
        found = sha256(archive)
        if found != MOVIELENS_SHA256[name]:
            raise ValueError(f"{url}: expected SHA-256 {MOVIELENS_SHA256[name]}, found {found}")
        unpacked = temporary / name
        unpacked.mkdir()
        with zipfile.ZipFile(archive) as zip_file:
            members = set(zip_file.namelist())
            for layout in MOVIELENS_LAYOUTS:
                for filename in {layout.ratings, layout.movies}:
                    if f"{name}/{filename}" in members:
                        with zip_file.open(f"{name}/{filename}") as packed, (unpacked / filename).open("wb") as file:
                            shutil.copyfileobj(packed, file)
        write_checksums(unpacked)
        move_folder(unpacked, folder)
    return folder


def _download(url: str, file: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, file.open("wb") as target:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=size, desc=url.rsplit("/", 1)[-1]) as stream:
                shutil.copyfileobj(stream, target)
    except OSError as error:
        raise OSError(
            f"could not download {url}: {error}; with the files at hand, pass their folder as data_dir"
        ) from error
