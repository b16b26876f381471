"""From files to checked Arrow tables with the columns `user`, `item`, `timestamp` and `title`."""

import csv
import itertools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq


logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")

# The ids of a text file. Whether they are integers is decided when all of them are known.
TEXT_ID = pa.dictionary(pa.int32(), pa.string())


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


def check_columns(found: list[str], wanted: list[str], path: str | Path) -> None:
    duplicates = [name for name in found if found.count(name) > 1]
    if duplicates:
        raise ValueError(f"{path}: column {duplicates[0]!r} appears more than once among {found}")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing, found {found}")


def _line_number(path: Path, record: int, layout: TextLayout | None) -> int:
    """Return the line, from 1, where a record, from 1 and without empty lines, ends; `layout` is None for JSON."""
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
    check_columns(found, wanted, path)

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
    check_columns(table.column_names, wanted, path)
    return table.select(wanted)


def _read_parquet(path: Path, wanted: list[str]) -> pa.Table:
    try:
        check_columns(pq.read_schema(path).names, wanted, path)
        return pq.read_table(path, columns=wanted, partitioning=None)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}") from error


def read_file(path: Path, wanted: list[str], ids: list[str], layout: TextLayout | None = None) -> pa.Table:
    """Read the columns `wanted` of one file; `ids` are those that hold ids."""
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
    """Convert numbers, dates, datetimes or strings without nulls to Unix seconds, int64 or float64."""
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


def check_rows(table: pa.Table, columns: Columns, source: str | Path, position: Callable[[int], str]) -> pa.Table:
    """
    Check one file's rows and rename the columns to `user`, `item`, `timestamp` and `title`.

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


def read_rows(paths: list[Path], columns: Columns, layout: TextLayout | None = None) -> pa.Table:
    """Read and checks files of one kind, in the given order."""
    ids = [name for name in (columns.user, columns.item, columns.title) if name is not None]
    tables = []
    for path in paths:
        table = read_file(path, columns.wanted(), ids, layout)

        def position(row: int, path: Path = path) -> str:
            if path.suffix == ".parquet":
                return f"row {row + 1}"
            text = None if path.suffix in JSON_SUFFIXES else layout or _text_layout(path)
            has_header = text is not None and text.names is None
            return f"line {_line_number(path, row + 1 + has_header, text)}"

        tables.append(check_rows(table, columns, path, position))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0].parent}: the files' columns differ in type: {error}") from error
