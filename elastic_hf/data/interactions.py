"""From rows (user, item, time) to checked, time-ordered histories, split for training, validation and test.

    rows (user, item, time) -> sorted, without duplicates -> k-core -> one history per user -> train, validation, test

Arrow reads the rows; users and items become dense codes, so that every later step is a NumPy operation on a column.
"""

import csv
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens"

# SHA-256 of the archives at MOVIELENS_URL.
MOVIELENS_SHA256 = {
    "ml-100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "ml-1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "ml-20m": "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    "ml-25m": "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    "ml-latest-small": "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
}

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")

MIN_INTERACTIONS = 3  # one each for training, validation and test
USERS_PER_BATCH = 1_000  # rows of one Arrow record batch

# The ids of a text file. Whether they are integers is decided when all of them are known.
TEXT_ID = pa.dictionary(pa.int32(), pa.string())


class Histories(NamedTuple):
    """
    What [`load_histories`] returns.

    Attributes:
        histories (`DatasetDict`):
            Splits `train`, `validation` and `test`, memory-mapped, one row per user: `user_id`, `item_ids` (oldest
            first), `timestamps` (Unix seconds, as long as `item_ids`; only where the source has time) and, in
            `validation` and `test`, `target`: the item to predict after `item_ids`.
        items (`Dataset`):
            One row per item, sorted by `item_id`: `item_id`, `title` (null where unknown) and `count` (interactions in
            the `train` split).
        counts (`dict[str, int]`):
            `num_users`, `num_items`, `num_interactions` (after all filters), `num_duplicates` (exact duplicates
            dropped) and `num_filtered` (interactions removed by the k-core filter).
    """

    histories: DatasetDict
    items: Dataset
    counts: dict[str, int]


class Columns(NamedTuple):
    """The source's names of the columns; `timestamp` is None where rows come in time order and carry no time."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = "timestamp"
    title: str | None = None

    def wanted(self) -> list[str]:
        return list(dict.fromkeys(name for name in self if name is not None))


class TextLayout(NamedTuple):
    """How a text file is divided; `names` is None where its first line is a header."""

    delimiter: str = ","
    names: list[str] | None = None


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


def _check_columns(found: list[str], wanted: list[str], path: str | Path) -> None:
    duplicates = [name for name in found if found.count(name) > 1]
    if duplicates:
        raise ValueError(f"{path}: column {duplicates[0]!r} appears more than once among {found}")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing, found {found}")


def _line_number(path: Path, record: int, layout: TextLayout | None) -> int:
    """Returns the line, from 1, where a record, from 1 and without empty lines, ends; `layout` is None for JSON."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        if layout is None:
            numbers = (number for number, line in enumerate(file, start=1) if line.strip())
        else:
            quoting = csv.QUOTE_MINIMAL if layout.names is None else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=layout.delimiter, quoting=quoting)
            numbers = (reader.line_num for fields in reader if fields)
        return next(itertools.islice(numbers, record - 1, None))


def _text_layout(path: Path) -> TextLayout:
    if path.suffix != ".txt":
        return TextLayout("\t" if path.suffix == ".tsv" else ",")
    with path.open(encoding="utf-8", errors="replace") as file:
        return TextLayout("\t" if "\t" in file.readline() else " ", ["user_id", "item_id"])


def _read_text(path: Path, wanted: list[str], ids: list[str], layout: TextLayout) -> pa.Table:
    has_header = layout.names is None
    found = layout.names
    if has_header:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            found = next(csv.reader(file, delimiter=layout.delimiter), [])
    _check_columns(found, wanted, path)

    def read(use_threads: bool) -> pa.Table:
        return pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(column_names=layout.names, use_threads=use_threads),
            pa.csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if has_header else False,
                newlines_in_values=has_header,
            ),
            pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(ids, TEXT_ID),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    try:
        return read(use_threads=True)
    except pa.ArrowInvalid:
        logger.info(f"{path} cannot be read, reading it again serially to find the line")
    # Only the serial reader counts rows.
    try:
        return read(use_threads=False)
    except pa.ArrowInvalid as error:
        row = re.search(r"Row #(\d+): ", str(error))
        if row is None:
            raise ValueError(f"{path}: {error}") from error
        line = _line_number(path, int(row[1]), layout)
        raise ValueError(f"{path}, line {line}: {str(error).replace(row[0], '')}") from error


def _read_json(path: Path, wanted: list[str]) -> pa.Table:
    try:
        table = pa.json.read_json(path)
    except pa.ArrowInvalid as error:
        # Arrow counts rows from the start of a block, so the line is looked up here.
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise ValueError("expected one JSON object per line")
                except ValueError as line_error:
                    raise ValueError(f"{path}, line {number}: {line_error}") from error
        raise ValueError(f"{path}: {error}") from error
    _check_columns(table.column_names, wanted, path)
    return table.select(wanted)


def _read_parquet(path: Path, wanted: list[str]) -> pa.Table:
    try:
        _check_columns(pq.read_schema(path).names, wanted, path)
        return pq.read_table(path, columns=wanted, partitioning=None)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}") from error


def _read_file(path: Path, wanted: list[str], ids: list[str], layout: TextLayout | None = None) -> pa.Table:
    """Reads the columns `wanted` of one file; `ids` are those that hold ids."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if layout is None and path.suffix in TEXT_SUFFIXES:
        layout = _text_layout(path)
    if layout is not None:
        return _read_text(path, wanted, ids, layout)
    if path.suffix in JSON_SUFFIXES:
        return _read_json(path, wanted)
    if path.suffix == ".parquet":
        return _read_parquet(path, wanted)
    raise ValueError(f"{path} must end in one of {SUFFIXES}")


def _unix_seconds(column: pa.ChunkedArray, reject: Callable[[pa.ChunkedArray, str], None]) -> np.ndarray:
    """Converts numbers, dates, datetimes or strings without nulls to Unix seconds, int64 or float64."""
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        is_date = pc.match_substring_regex(column, r"^\d{4}-\d{2}-\d{2}")
        is_number = pc.match_substring_regex(column, r"^-?\d+(\.\d*)?$")
        if is_date[0].as_py():
            reject(pc.invert(is_date), "expected an ISO 8601 date as in the first row")
            targets = (pa.timestamp("us"), pa.timestamp("us", "UTC"))
        else:
            reject(pc.invert(is_number), "expected Unix seconds or an ISO 8601 date")
            targets = (pa.int64(), pa.float64())
        try:
            column = column.cast(targets[0])
        except pa.ArrowInvalid:
            column = column.cast(targets[1])
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        ticks_per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        ticks = column.cast(pa.int64()).to_numpy()
        has_fraction = np.any(ticks % ticks_per_second)
        return ticks / ticks_per_second if has_fraction else ticks // ticks_per_second
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(column.type):
        return column.cast(pa.float64()).to_numpy()
    raise pa.ArrowInvalid(f"expected numbers, dates, datetimes or ISO 8601 strings, found type {column.type}")


def _checked(table: pa.Table, columns: Columns, source: str | Path, position: Callable[[int], str]) -> pa.Table:
    """
    Checks one file's rows and renames the columns to `user`, `item`, `timestamp` and `title`.

    Args:
        position (`Callable[[int], str]`): From a row's index to the words that tell a reader where it is.
    """
    if table.num_rows == 0:
        raise ValueError(f"{source} has no rows")
    checked = {}
    for role, name in columns._asdict().items():
        if name is None:
            continue
        column = table[name]

        def reject(mask: np.ndarray | pa.ChunkedArray, problem: str, name: str = name, column=column) -> None:
            rows = np.flatnonzero(mask)
            if rows.size:
                value = column[int(rows[0])].as_py()
                raise ValueError(f"{source}, {position(int(rows[0]))}: {name} is {value!r}, expected {problem}")

        if column.null_count and role != "title":
            reject(column.is_null(), "a value")
        try:
            if role == "timestamp":
                seconds = _unix_seconds(column, reject)
            elif pa.types.is_integer(column.type):
                column = column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{source}: column {name!r}: {error}") from error
        if role == "timestamp":
            reject(~(np.isfinite(seconds) & (seconds >= 0)), "a finite timestamp of at least 0 Unix seconds")
            column = pa.chunked_array([seconds])
        elif column.type not in (TEXT_ID, pa.int64()):
            value_type = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
                raise ValueError(f"{source}: column {name!r} must hold integers or strings, found type {column.type}")
            column = column.cast(pa.large_string())
            if role != "title":
                reject(pc.equal(column, ""), "a value")
        checked[role] = column
    return pa.table(checked)


def _read_rows(paths: list[Path], columns: Columns, layout: TextLayout | None = None) -> pa.Table:
    """Reads and checks files of one kind, in the given order."""
    ids = [name for name in (columns.user, columns.item, columns.title) if name is not None]
    tables = []
    for path in paths:
        table = _read_file(path, columns.wanted(), ids, layout)

        def position(row: int, path: Path = path) -> str:
            if path.suffix == ".parquet":
                return f"row {row + 1}"
            text = None if path.suffix in JSON_SUFFIXES else layout or _text_layout(path)
            has_header = text is not None and text.names is None
            return f"line {_line_number(path, row + 1 + has_header, text)}"

        tables.append(_checked(table, columns, path, position))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0].parent}: the files' columns differ in type: {error}") from error


def _read_titles(path: Path) -> pa.Table:
    """Reads a file of items into a table with the columns `item_id` and `title`."""
    separator = {"u.item": "|", "movies.dat": "::"}.get(path.name)
    if separator is None:
        names = ["movieId", "title"] if path.name == "movies.csv" else ["item_id", "title"]
        return _read_file(path, names, names).rename_columns(["item_id", "title"])
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_movielens(name: str, cache_dir: Path) -> Path:
    """Downloads and unpacks a MovieLens release, if the cache does not have it, and returns its folder."""
    folder = cache_dir / name
    if folder.is_dir():
        return folder
    url = f"{MOVIELENS_URL}/{name}.zip"
    temporary = _temporary_folder(cache_dir)
    try:
        archive = temporary / "archive.zip"
        try:
            with urllib.request.urlopen(url, timeout=60) as response, archive.open("wb") as file:
                size = int(response.headers.get("Content-Length", 0)) or None
                with tqdm.wrapattr(response, "read", total=size, desc=f"{name}.zip") as stream:
                    shutil.copyfileobj(stream, file)
        except OSError as error:
            raise OSError(
                f"could not download {url}: {error}; with the files at hand, pass their folder as data_dir"
            ) from error
        found = _digest(archive)
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
        _move_unless_exists(unpacked, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _temporary_folder(cache_dir: Path) -> Path:
    folder = cache_dir / f"tmp-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    return folder


def _move_unless_exists(folder: Path, destination: Path) -> None:
    try:
        os.replace(folder, destination)
    except OSError:
        # Another process with the same task was faster.
        if not destination.is_dir():
            raise


def _read_folder(path: Path, overrides: dict[str, str]) -> tuple[pa.Table, pa.Table | None]:
    for layout in MOVIELENS_LAYOUTS:
        if (path / layout.ratings).is_file() and (path / layout.movies).is_file():
            columns = layout.columns._replace(**overrides)
            return _read_rows([path / layout.ratings], columns, layout.text), _read_titles(path / layout.movies)
    paths = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    suffixes = sorted({file.suffix for file in paths})
    if len(suffixes) != 1:
        raise ValueError(
            f"{path} must hold the raw files of a MovieLens release, or files of one kind among {SUFFIXES}, "
            f"found {[file.name for file in paths]}"
        )
    return _read_rows(paths, _default_columns(paths[0])._replace(**overrides)), None


def _default_columns(path: Path) -> Columns:
    return Columns(timestamp=None) if path.suffix == ".txt" else Columns()


def _read_source(
    source: str,
    data_dir: str | os.PathLike | None,
    overrides: dict[str, str],
    dataset_config_name: str | None,
    dataset_split: str,
    cache_dir: Path,
) -> tuple[pa.Table, pa.Table | None]:
    """
    Reads the rows of a source, and its titles where it has them.

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
        return _read_rows([path], _default_columns(path)._replace(**overrides)), None

    columns = Columns()._replace(**overrides)
    titles = None
    if source == "synthetic":
        from .synthetic import make_interactions

        interactions, items = make_interactions()
        _check_columns(interactions.columns, columns.wanted(), source)
        table, titles = interactions.to_arrow(), items.to_arrow()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in SUFFIXES:
        dataset = datasets.load_dataset(source, dataset_config_name, split=dataset_split)
        _check_columns(dataset.column_names, columns.wanted(), source)
        table = dataset.select_columns(columns.wanted()).with_format("arrow")[:]
    else:
        raise ValueError(
            f"source must be 'synthetic', one of {list(MOVIELENS_SHA256)}, an existing file or folder, or a dataset "
            f"on the Hub as 'org/name', found {source!r}"
        )
    return _checked(table, columns, source, lambda row: f"row {row + 1}"), titles


def _integers_if_canonical(ids: pa.Array) -> pa.Array:
    """Turns strings into integers if every one of them is written as Python would write the integer."""
    try:
        integers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return integers if integers.cast(ids.type).equals(ids) else ids


def _encode_ids(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Returns the distinct ids, sorted, and each row's index among them."""
    is_text = column.type == TEXT_ID
    if not is_text:
        column = column.dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    ids = encoded.dictionary
    if is_text:
        ids = _integers_if_canonical(ids)
    elif ids.type != pa.int64():
        ids = ids.cast(pa.string())
    order = pc.sort_indices(ids)
    ranks = np.empty(len(ids), np.int32)
    ranks[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    return ids.take(order), ranks[encoded.indices.to_numpy()]


def _drop_unused(ids: pa.Array, codes: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    used = np.bincount(codes, minlength=len(ids)) > 0
    return ids.filter(pa.array(used)), (np.cumsum(used, dtype=np.int32) - 1)[codes]


def _is_first_of_its_kind(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Returns False for rows that equal an earlier one; rows are sorted by user and time."""
    first = np.ones(users.size, bool)
    tied = (users[1:] == users[:-1]) & (timestamps[1:] == timestamps[:-1])
    in_tie = np.zeros(users.size, bool)
    in_tie[1:] = tied
    in_tie[:-1] |= tied
    rows = np.flatnonzero(in_tie)
    tie = np.cumsum(np.concatenate([[True], ~tied]))[rows]
    # (tie, item) as one integer: the stable sort puts equal rows side by side, the earliest first
    key = tie * (int(items.max()) + 1) + items[rows]
    order = np.argsort(key, kind="stable")
    first[rows[order[1:][key[order[1:]] == key[order[:-1]]]]] = False
    return first


def _k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the rows that are left when no user and no item has fewer than `k` of them."""
    rows = np.arange(users.size)
    while True:
        row_users, row_items = users[rows], items[rows]
        kept = (np.bincount(row_users)[row_users] >= k) & (np.bincount(row_items)[row_items] >= k)
        if kept.all():
            return rows
        rows = rows[kept]


def _temporal_prefixes(
    users: np.ndarray, timestamps: np.ndarray, lengths: np.ndarray, validation_fraction: float, test_fraction: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns for each split the users in it and how many of each one's interactions come before the target."""
    cutoffs = np.quantile(timestamps, [1 - validation_fraction - test_fraction, 1 - test_fraction], method="higher")
    before_validation, before_test = (
        np.bincount(users[timestamps < cutoff], minlength=lengths.size) for cutoff in cutoffs
    )
    in_split = {
        "train": (before_validation, before_validation > 0),
        "validation": (before_validation, before_test > before_validation),
        "test": (before_test, lengths > before_test),
    }
    prefixes = {}
    for name, (before, candidates) in in_split.items():
        rows = np.flatnonzero(candidates & (before > 0))
        if not rows.size:
            raise ValueError(
                f"the temporal split leaves {name} without users: change validation_fraction and test_fraction"
            )
        num_new = int(np.count_nonzero(candidates)) - rows.size
        if num_new:
            logger.warning(f"{name} leaves out {num_new:,} users who have no history before the cutoff")
        prefixes[name] = (rows, before[rows])
    return prefixes


def _positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns `starts[0], starts[0] + 1, ...`, `lengths[0]` of them, then the same for `starts[1]` and so on."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def _first_titles(titles: pa.ChunkedArray, items: np.ndarray, item_ids: pa.Array) -> pa.Table:
    rows = np.flatnonzero(titles.is_valid())
    first = np.full(len(item_ids), -1)
    first[items[rows[::-1]]] = rows[::-1]  # of several values for one index the last one stays, here the earliest row
    known = first >= 0
    return pa.table({"item_id": item_ids.filter(pa.array(known)), "title": titles.take(pa.array(first[known]))})


def _align_titles(item_ids: pa.Array, titles: pa.Table | None) -> pa.Array:
    """Returns the title of each item, null where there is none."""
    if titles is None:
        return pa.nulls(len(item_ids), pa.string())
    try:
        ids = titles["item_id"].cast(pa.string()).cast(item_ids.type)
    except pa.ArrowInvalid as error:
        raise ValueError(f"the titles' item ids are not of the interactions' type {item_ids.type}: {error}") from error
    rows = pc.index_in(item_ids, ids)
    if rows.null_count:
        logger.warning(f"{rows.null_count:,} of {len(item_ids):,} items have no title")
    found = titles["title"].cast(pa.string()).take(rows)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _history_batches(
    rows: np.ndarray,
    prefix_lengths: np.ndarray,
    starts: np.ndarray,
    user_ids: pa.Array,
    item_ids: pa.Array,
    items: np.ndarray,
    timestamps: np.ndarray | None,
    with_target: bool,
) -> Iterator[dict[str, pa.Array]]:
    """Yields for the users `rows` the first `prefix_lengths` of their interactions, and the item that comes next."""
    for first in range(0, rows.size, USERS_PER_BATCH):
        batch_rows = rows[first : first + USERS_PER_BATCH]
        lengths = prefix_lengths[first : first + USERS_PER_BATCH]
        positions = _positions(starts[batch_rows], lengths)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        batch = {
            "user_id": user_ids.take(pa.array(batch_rows)),
            "item_ids": pa.ListArray.from_arrays(offsets, item_ids.take(pa.array(items[positions]))),
        }
        if timestamps is not None:
            batch["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(timestamps[positions]))
        if with_target:
            batch["target"] = item_ids.take(pa.array(items[starts[batch_rows] + lengths]))
        yield batch


def _write_arrow(path: Path, features: Features, batches: Iterable[dict[str, pa.Array]]) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch, schema=schema))


def _move_to_content_name(folder: Path, cache_dir: Path) -> Path:
    """Names a folder after its content: loading a source again takes no more disk and finds the caches of `map`."""
    content = "".join(f"{path.name} {_digest(path)}\n" for path in sorted(folder.iterdir()))
    destination = cache_dir / f"histories-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    _move_unless_exists(folder, destination)
    return destination


def load_histories(
    source: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    title_column: str | None = None,
    items_file: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    k_core: int = 5,
    split: str = "leave_one_out",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    cache_dir: str | os.PathLike | None = None,
) -> Histories:
    """
    Reads interactions, checks them and returns every user's history, split for training, validation and test.

    The rules, in the order in which they apply:

    1. Rows with a null user, item or timestamp, or with a negative or non-finite timestamp, are errors.
    2. A user's rows are ordered by time; rows with equal timestamps, and all rows of a source without time, keep the
       order in which the source has them.
    3. Rows equal in user, item and timestamp are one interaction: the first is kept, the others are counted in
       `counts["num_duplicates"]` and reported as a warning. A source without time keeps its repeats.
    4. Users and items with fewer than `k_core` interactions are removed, again and again until none is left.
    5. A user with fewer than three interactions is then an error.

    Args:
        source (`str` or `os.PathLike`):
            One of

            - a built-in dataset: `"synthetic"`, or `"ml-100k"`, `"ml-1m"`, `"ml-20m"`, `"ml-25m"` or
              `"ml-latest-small"`, downloaded from GroupLens;
            - a `.csv`, `.tsv`, `.parquet`, `.jsonl` or `.json` (one object per line) file, or a `.txt` file of
              `user item` lines in time order, without header or time;
            - a folder of such files, all of one kind, which are read in the order of their names;
            - a folder with raw MovieLens files: `u.data` and `u.item`, `ratings.dat` and `movies.dat`, or
              `ratings.csv` and `movies.csv`;
            - a dataset on the Hub, as `"org/name"`.
        data_dir (`str` or `os.PathLike`, *optional*):
            A folder with the raw files of the MovieLens dataset that `source` names; nothing is downloaded then.
        user_column, item_column, timestamp_column (`str`, *optional*):
            Columns of the source; `user_id`, `item_id` and `timestamp` if not given. Ids are integers or strings and
            stay so. In text files they are integers if all of a column are written as such (`007` is not). Timestamps
            are Unix seconds, integers or floats. Dates, datetimes and ISO 8601 strings become Unix seconds, in UTC
            where they name no zone, and integers where no row has a fraction of a second.
        title_column (`str`, *optional*):
            Column of the source with the items' titles; an item's first title counts.
        items_file (`str` or `os.PathLike`, *optional*):
            A file with titles: `u.item`, `movies.dat`, `movies.csv`, or any `.csv`, `.tsv`, `.parquet` or `.jsonl`
            file with the columns `item_id` and `title`. It replaces the titles that come with a source.
        dataset_config_name (`str`, *optional*):
            The configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split of a Hub dataset that holds the interactions.
        k_core (`int`, *optional*, defaults to 5):
            The least number of interactions of every user and item; 0 filters nothing.
        split (`str`, *optional*, defaults to `"leave_one_out"`):
            `"leave_one_out"`: a user's last item is the test target, the second last the validation target, and the
            items before both are for training. `"temporal"`: two cutoffs in time, the same for all users. Interactions
            before the first are for training; a user with an interaction between the cutoffs is in `validation`, one
            with an interaction at or after the second in `test`. The target is the user's first item there, and the
            history all items before it. Users without history before the cutoff are left out of a split and reported.
        validation_fraction, test_fraction (`float`, *optional*, default to 0.1):
            Shares of the interactions, the latest for test, that set the cutoffs of the temporal split.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where downloads and the result's Arrow files are kept; a folder in the cache of `datasets` if not given.

    Returns:
        [`Histories`]: the histories, the items and the counts.

    Raises:
        ValueError: if an argument or the source's content is not as described; the message names the file and the
            line, row or column.
        OSError: if a download fails.
    """
    if split not in ("leave_one_out", "temporal"):
        raise ValueError(f"split must be 'leave_one_out' or 'temporal', found {split!r}")
    if not isinstance(k_core, int) or k_core < 0:
        raise ValueError(f"k_core must be an integer of at least 0, found {k_core!r}")
    if split == "temporal" and not (
        validation_fraction > 0 and test_fraction > 0 and validation_fraction + test_fraction < 1
    ):
        raise ValueError(
            "validation_fraction and test_fraction must be positive and sum to less than 1, "
            f"found {validation_fraction} and {test_fraction}"
        )
    if title_column is not None and items_file is not None:
        raise ValueError("title_column and items_file both give titles: set only one of them")
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "elastic_hf"
    cache_dir = Path(cache_dir)

    overrides = {"user": user_column, "item": item_column, "timestamp": timestamp_column, "title": title_column}
    overrides = {field: name for field, name in overrides.items() if name is not None}
    source = os.fspath(source)

    # rows
    table, titles = _read_source(source, data_dir, overrides, dataset_config_name, dataset_split, cache_dir)
    if items_file is not None:
        titles = _read_titles(Path(items_file))
    has_time = "timestamp" in table.column_names
    if split == "temporal" and not has_time:
        raise ValueError(f"split='temporal' needs timestamps, {source} has none")

    # codes in the order of the ids
    user_ids, users = _encode_ids(table["user"])
    item_ids, items = _encode_ids(table["item"])
    timestamps = table["timestamp"].to_numpy() if has_time else None
    if title_column is not None:
        titles = _first_titles(table["title"], items, item_ids)
    del table

    def keep(rows: np.ndarray) -> None:
        nonlocal users, items, timestamps
        users, items = users[rows], items[rows]
        if has_time:
            timestamps = timestamps[rows]

    # time order
    keep(np.lexsort((timestamps, users)) if has_time else np.argsort(users, kind="stable"))

    # filters
    num_duplicates = 0
    if has_time:
        is_first = _is_first_of_its_kind(users, items, timestamps)
        num_duplicates = int(is_first.size - np.count_nonzero(is_first))
        if num_duplicates:
            logger.warning(f"{source}: dropped {num_duplicates:,} rows that repeat another's user, item and timestamp")
            keep(is_first)
    num_interactions = users.size
    if k_core:
        keep(_k_core(users, items, k_core))
    num_filtered = num_interactions - users.size
    if not users.size:
        raise ValueError(f"{source}: none of {num_interactions:,} interactions is left with k_core={k_core}")
    user_ids, users = _drop_unused(user_ids, users)
    item_ids, items = _drop_unused(item_ids, items)

    # one history per user
    lengths = np.bincount(users)
    num_short = int(np.count_nonzero(lengths < MIN_INTERACTIONS))
    if num_short:
        raise ValueError(
            f"{source}: {num_short:,} of {lengths.size:,} users have fewer than {MIN_INTERACTIONS} interactions with "
            f"k_core={k_core}: set k_core to {MIN_INTERACTIONS} or more to leave such users out"
        )
    starts = np.cumsum(lengths) - lengths
    if split == "leave_one_out":
        rows = np.arange(lengths.size)
        prefixes = {"train": (rows, lengths - 2), "validation": (rows, lengths - 2), "test": (rows, lengths - 1)}
    else:
        prefixes = _temporal_prefixes(users, timestamps, lengths, validation_fraction, test_fraction)

    train_rows, train_lengths = prefixes["train"]
    train_counts = np.bincount(items[_positions(starts[train_rows], train_lengths)], minlength=len(item_ids))
    id_types = {"user_id": Value(str(user_ids.type)), "item_id": Value(str(item_ids.type))}
    item_batch = {"item_id": item_ids, "title": _align_titles(item_ids, titles), "count": pa.array(train_counts)}
    item_features = {"item_id": id_types["item_id"], "title": Value("string"), "count": Value("int64")}

    # Arrow files
    temporary = _temporary_folder(cache_dir)
    try:
        for name, (rows, prefix_lengths) in prefixes.items():
            features = {"user_id": id_types["user_id"], "item_ids": List(id_types["item_id"])}
            if has_time:
                features["timestamps"] = List(Value("int64" if timestamps.dtype == np.int64 else "float64"))
            if name != "train":
                features["target"] = id_types["item_id"]
            batches = _history_batches(
                rows, prefix_lengths, starts, user_ids, item_ids, items, timestamps, with_target="target" in features
            )
            _write_arrow(temporary / f"{name}.arrow", Features(features), batches)
        _write_arrow(temporary / "items.arrow", Features(item_features), [item_batch])
        folder = _move_to_content_name(temporary, cache_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    return Histories(
        DatasetDict({name: Dataset.from_file(str(folder / f"{name}.arrow"), split=name) for name in prefixes}),
        items=Dataset.from_file(str(folder / "items.arrow")),
        counts={
            "num_users": len(user_ids),
            "num_items": len(item_ids),
            "num_interactions": users.size,
            "num_duplicates": num_duplicates,
            "num_filtered": num_filtered,
        },
    )
