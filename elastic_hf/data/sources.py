"""From a source to the tables of its rows and titles: files, folders, tables, MovieLens, the Hub and the generator."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict

from .columns import ColumnRequest
from .files import ENDINGS, JSON_SUFFIXES, kind_of
from .movielens import MOVIELENS_SHA256, RELEASE_FILES, download_movielens, find_layout, read_movies
from .readers import read_files
from .text_reader import TextLayout
from .values import check_rows


logger = logging.getLogger(__name__)

GLOB_CHARACTERS = re.compile(r"[*?\[]")


def read_source(
    source: Any,
    request: ColumnRequest,
    column_names: Sequence[str] | None,
    data_dir: str | os.PathLike | None,
    dataset_config_name: str | None,
    dataset_split: str,
    cache_dir: Path,
) -> tuple[pa.Table, pa.Table | None]:
    """
    Read the rows of a source, and its titles where it has them.

    Args:
        source, column_names, data_dir, dataset_config_name, dataset_split, cache_dir: As in [`load_histories`].
        request (`ColumnRequest`): The columns to look for.

    Returns:
        `tuple[pyarrow.Table, pyarrow.Table | None]`: the rows as [`~values.check_rows`] returns them, and the titles
        with the columns `item` and `title`.

    Raises:
        ValueError: if there is no such source, or it does not hold what is expected.
    """
    if data_dir is not None:
        if not str(source).startswith("ml-"):
            raise ValueError(f"data_dir is for MovieLens datasets such as 'ml-1m', found source {source!r}")
        return _read_movielens(Path(data_dir), request)
    if isinstance(source, list | tuple) and all(isinstance(part, str | os.PathLike) for part in source):
        return read_files(find_files(source, cache_dir), request, column_names), None
    if not isinstance(source, str | os.PathLike):
        return _read_table(source, request, dataset_split), None
    source = os.fspath(source)
    if source in MOVIELENS_SHA256:
        return _read_movielens(download_movielens(source, cache_dir), request)
    path = Path(source)
    if path.is_dir():
        if find_layout(path) is not None:
            _refuse_other_files(path)
            return _read_movielens(path, request)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _read_table(_load_saved(path), request, dataset_split, path), None
    if path.exists() or GLOB_CHARACTERS.search(source):
        return read_files(find_files([source], cache_dir), request, column_names), None
    if source == "synthetic":
        from .synthetic import make_interactions

        interactions, items = make_interactions()
        titles = items.to_arrow().rename_columns({"item_id": "item"})
        return _read_table(interactions, request, dataset_split, source), titles
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and kind_of(path) is None:
        dataset = datasets.load_dataset(source, dataset_config_name, split=dataset_split)
        return _read_table(dataset, request, dataset_split, source), None
    raise ValueError(
        f"source must be 'synthetic', one of {list(MOVIELENS_SHA256)}, a table, an existing file or folder, or a "
        f"dataset on the Hub as 'org/name', found {source!r}"
    )


def read_titles(path: Path, layout: TextLayout | None = None) -> pa.Table:
    """Read a file of items into a table with the columns `item` and `title`."""
    movies = read_movies(path)
    return read_files([path], ColumnRequest(roles=("item", "title")), layout=layout) if movies is None else movies


def _read_movielens(folder: Path, request: ColumnRequest) -> tuple[pa.Table, pa.Table]:
    layout = find_layout(folder)
    if layout is None:
        raise ValueError(f"{folder} must hold the raw files of a MovieLens release, found none of them")
    ratings = read_files([folder / layout.ratings], request, layout=layout.text)
    return ratings, read_titles(folder / layout.movies, layout.text)


def _refuse_other_files(folder: Path) -> None:
    """Refuse files that would be read if the folder were not taken for a MovieLens release."""
    names = sorted(path.name for path in folder.iterdir() if kind_of(path) is not None)
    others = [name for name in names if name not in RELEASE_FILES]
    if others:
        raise ValueError(f"{folder} must hold the raw files of a MovieLens release and no others, found {others[:10]}")


def find_files(sources: Sequence[str | os.PathLike], cache_dir: Path) -> list[Path]:
    """
    Return the files of files, folders and patterns, in the given order and by name within a folder or pattern.

    Raises:
        ValueError: if there are none, one of them twice, or of several kinds, or if a folder holds what is not read.
    """
    paths = []
    for source in map(os.fspath, sources):
        matches = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not matches:
            raise ValueError(f"source must be an existing file or folder, or match one, found {source!r}")
        for match in map(Path, matches):
            paths += _files_of_folder(match, cache_dir) if match.is_dir() else [match]
    if not paths:
        raise ValueError(f"source must hold a file, found {[os.fspath(source) for source in sources]}")
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"source names {path} more than once")
        seen.add(path.resolve())
    kinds = {kind_of(path): path for path in reversed(paths)}
    if len({"json" if kind in JSON_SUFFIXES else kind for kind in kinds}) > 1:
        raise ValueError(f"source must hold files of one kind, found {', '.join(map(str, kinds.values()))}")
    return paths


def _files_of_folder(folder: Path, cache_dir: Path) -> list[Path]:
    """
    Return the files in a folder and its subfolders, by name.

    Left out are hidden files, whose names begin with a dot, the marks of other programs, such as `_SUCCESS`, and the
    cache, if it is in the folder.
    """
    names = sorted(glob.glob("**", root_dir=folder, recursive=True, include_hidden=True))
    root = folder.resolve()
    paths, hidden, unread = [], [], []
    for name in names:
        path = folder / name
        if path.is_dir() or (root / name).is_relative_to(cache_dir.resolve()):
            continue
        parts = Path(name).parts
        if any(part.startswith(".") for part in parts):
            hidden += [name] * (kind_of(path) is not None)
        elif any(part.startswith("_") for part in parts):
            unread += [name] * (kind_of(path) is not None)
        elif kind_of(path) is None:
            unread.append(name)
        else:
            paths.append(path)
    if unread:
        raise ValueError(
            f"{folder} holds files that are not read, {unread[:10]}: a name must not begin with _ and must end in one "
            f"of {ENDINGS}. Take them away, or give the files to read as a list or a pattern"
        )
    if hidden:
        logger.warning(f"{folder}: leaving out hidden files, {hidden[:10]}")
    if not paths:
        raise ValueError(f"{folder} must hold files that end in one of {ENDINGS}, found none")
    return paths


def _load_saved(folder: Path) -> Dataset | DatasetDict:
    try:
        return datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} cannot be loaded as a saved dataset: {error}") from error


def _read_table(source: Any, request: ColumnRequest, split: str, name: str | Path | None = None) -> pa.Table:
    """Read a table in memory: of `datasets`, or any that hands its columns on as Arrow."""
    name = type(source).__name__ if name is None else name
    if isinstance(source, DatasetDict):
        if split not in source:
            raise ValueError(f"{name}: dataset_split must be one of {list(source)}, found {split!r}")
        source = source[split]
    if isinstance(source, Dataset):
        found = source.column_names
        columns = request.find(found, name)
        table = source.select_columns(columns.wanted()).with_format("arrow")[:]
    else:
        table, found = _to_arrow(source, request, name)
        columns = request.find(found, name)
    request.report(columns, found, name)
    if table.num_rows == 0:
        raise ValueError(f"{name} has no rows")
    return check_rows(table, columns, name, lambda row: f"row {row + 1}")


def _to_arrow(source: Any, request: ColumnRequest, name: str | Path) -> tuple[pa.Table, list[str]]:
    """Return the table of a source and its columns: all of them or, where Arrow does not hold all, those wanted."""
    if not hasattr(source, "__arrow_c_stream__"):
        raise ValueError(
            "source must be a path, a list of paths, a datasets.Dataset, or a table of pandas (2.2 or later), polars "
            f"or Arrow, found {type(source).__module__}.{type(source).__qualname__}"
        )
    try:
        table = pa.table(source)
        return table, table.column_names
    except (pa.ArrowException, TypeError, ValueError) as error:
        found = [str(column) for column in getattr(source, "columns", ())]
        wanted = request.find(found, name).wanted()
        try:
            return pa.table(source[wanted]), found
        except (pa.ArrowException, TypeError, ValueError, LookupError):
            raise ValueError(f"{name}: {error}") from error
