"""From a source to the tables of its rows and titles: files, folders, MovieLens, the Hub and the generator."""

import os
import re
import shutil
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .cache import move_unless_exists, sha256, temporary_folder
from .readers import SUFFIXES, Columns, TextLayout, check_columns, check_rows, read_file, read_rows


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
    """The files of a MovieLens release that hold the interactions and the titles."""

    ratings: str
    movies: str
    text: TextLayout
    columns: Columns


_U_DATA = TextLayout("\t", ["user_id", "item_id", "rating", "timestamp"])
# Every field is a number, so `::` can be read as an empty field between two colons.
_RATINGS_DAT = TextLayout(":", ["user_id", "empty_1", "item_id", "empty_2", "rating", "empty_3", "timestamp"])
MOVIELENS_LAYOUTS = (
    MovieLensLayout("u.data", "u.item", _U_DATA, Columns()),
    MovieLensLayout("ratings.dat", "movies.dat", _RATINGS_DAT, Columns()),
    MovieLensLayout("ratings.csv", "movies.csv", TextLayout(), Columns("userId", "movieId")),
)


def read_titles(path: Path) -> pa.Table:
    """Read a file of items into a table with the columns `item_id` and `title`."""
    separator = {"u.item": "|", "movies.dat": "::"}.get(path.name)
    if separator is None:
        names = ["movieId", "title"] if path.name == "movies.csv" else ["item_id", "title"]
        return read_file(path, names, names).rename_columns(["item_id", "title"])
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
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
    return pa.table({"item_id": pc.list_element(fields, 0), "title": pc.list_element(fields, 1)})


def _download_movielens(name: str, cache_dir: Path) -> Path:
    """Download and unpack a MovieLens release, if the cache does not have it, and return its folder."""
    folder = cache_dir / name
    if folder.is_dir():
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
        move_unless_exists(unpacked, folder)
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


def _read_folder(path: Path, overrides: dict[str, str]) -> tuple[pa.Table, pa.Table | None]:
    for layout in MOVIELENS_LAYOUTS:
        if (path / layout.ratings).is_file() and (path / layout.movies).is_file():
            columns = layout.columns._replace(**overrides)
            return read_rows([path / layout.ratings], columns, layout.text), read_titles(path / layout.movies)
    paths = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    suffixes = sorted({file.suffix for file in paths})
    if len(suffixes) != 1:
        raise ValueError(
            f"{path} must hold the raw files of a MovieLens release, or files of one kind among {SUFFIXES}, "
            f"found {[file.name for file in paths]}"
        )
    return read_rows(paths, _default_columns(paths[0])._replace(**overrides)), None


def _default_columns(path: Path) -> Columns:
    return Columns(timestamp=None) if path.suffix == ".txt" else Columns()


def read_source(
    source: str,
    data_dir: str | os.PathLike | None,
    overrides: dict[str, str],
    dataset_config_name: str | None,
    dataset_split: str,
    cache_dir: Path,
) -> tuple[pa.Table, pa.Table | None]:
    """
    Read the rows of a source, and its titles where it has them.

    Args:
        overrides (`dict[str, str]`): Fields of `Columns` that replace the source's defaults.
    """
    if data_dir is not None:
        if not source.startswith("ml-"):
            raise ValueError(f"data_dir is for MovieLens datasets such as 'ml-1m', found source {source!r}")
        if not Path(data_dir).is_dir():
            raise ValueError(f"data_dir {data_dir} is not a folder")
        return _read_folder(Path(data_dir), overrides)
    if source in MOVIELENS_SHA256:
        return _read_folder(_download_movielens(source, cache_dir), overrides)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, overrides)
    if path.exists():
        return read_rows([path], _default_columns(path)._replace(**overrides)), None

    columns = Columns()._replace(**overrides)
    titles = None
    if source == "synthetic":
        from .synthetic import make_interactions

        interactions, items = make_interactions()
        check_columns(interactions.columns, columns.wanted(), source)
        table, titles = interactions.to_arrow(), items.to_arrow()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in SUFFIXES:
        dataset = datasets.load_dataset(source, dataset_config_name, split=dataset_split)
        check_columns(dataset.column_names, columns.wanted(), source)
        table = dataset.select_columns(columns.wanted()).with_format("arrow")[:]
    else:
        raise ValueError(
            f"source must be 'synthetic', one of {list(MOVIELENS_SHA256)}, an existing file or folder, or a dataset "
            f"on the Hub as 'org/name', found {source!r}"
        )
    return check_rows(table, columns, source, lambda row: f"row {row + 1}"), titles
