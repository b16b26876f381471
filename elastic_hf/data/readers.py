"""From files to checked Arrow tables with the columns `user`, `item`, `timestamp`, `title` and those of events."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .columns import EVENT_PREFIX, ColumnRequest, Columns, check_columns
from .encoding import TEXT_ID
from .files import ENDINGS, JSON_SUFFIXES, TEXT_SUFFIXES, kind_of
from .json_reader import JsonReader
from .text_reader import TextLayout, TextReader
from .values import check_rows


class ParquetReader:
    """The rows of one Parquet file."""

    is_empty = False
    in_time_order = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = pq.read_schema(path).names

    def read(self, columns: Columns) -> pa.Table:
        """Return the columns that the file has."""
        names = [name for name in columns.wanted() if name in self.names]
        return pq.read_table(self.path, columns=names, partitioning=None)

    def position(self, row: int) -> str:
        return f"row {row + 1}"


def open_reader(
    path: Path,
    request: ColumnRequest,
    column_names: Sequence[str] | None = None,
    layout: TextLayout | None = None,
) -> TextReader | JsonReader | ParquetReader:
    """Return the reader of a file, by its name."""
    kind = kind_of(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if layout is not None or kind in TEXT_SUFFIXES:
        return TextReader(path, request, column_names, layout)
    if kind is None:
        raise ValueError(f"{path} must end in one of {ENDINGS}")
    if column_names is not None:
        raise ValueError(f"column_names are for text files without a header, found {path}")
    return JsonReader(path) if kind in JSON_SUFFIXES else ParquetReader(path)


def read_files(
    paths: Sequence[Path],
    request: ColumnRequest,
    column_names: Sequence[str] | None = None,
    layout: TextLayout | None = None,
) -> pa.Table:
    """
    Read and check files of one kind, in the given order.

    Folders named `key=value` on the way to a file give columns that the file itself lacks. A file without rows is none
    of the result, if there are others.

    Args:
        paths (`Sequence[Path]`): The files.
        request (`ColumnRequest`): The columns to look for.
        column_names (`Sequence[str]`, *optional*): The columns of text files without a header.
        layout (`TextLayout`, *optional*): How text files are divided, where that is known.

    Returns:
        `pyarrow.Table`: The rows, as [`~values.check_rows`] returns them.

    Raises:
        ValueError: if a file cannot be read, or does not hold what is expected; the message names it.
    """
    columns = None
    tables = {}
    for path in paths:
        try:
            reader = open_reader(path, request, column_names, layout)
            if reader.is_empty:
                continue
            keys = _hive_keys(path)
            if columns is None:
                if reader.in_time_order and "timestamp" not in request.names:
                    request = replace(request, roles=("user", "item"))
                is_first_line = isinstance(reader, TextReader) and reader.has_header
                columns = request.find(reader.names, path, list(keys), is_first_line)
                if layout is None:
                    request.report(columns, reader.names, path)
            check_columns([*reader.names, *(key for key in keys if key not in reader.names)], columns.wanted(), path)
            table = reader.read(columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
        if table.num_rows:
            for name in columns.wanted():
                if name not in reader.names:
                    table = table.append_column(name, _repeat(keys[name], table.num_rows, name != columns.timestamp))
            tables[path] = check_rows(table, columns, path, reader.position)
    if not tables:
        others = f", nor has any of the other {len(paths) - 1:,} files" if len(paths) > 1 else ""
        raise ValueError(f"{paths[0]} has no rows{others}")
    return _concatenate(tables)


def _concatenate(tables: dict[Path, pa.Table]) -> pa.Table:
    first_path, first = next(iter(tables.items()))
    for path, table in tables.items():
        for name in table.column_names:
            types = {table[name].type, first[name].type}
            # Numbers may be integers and floats, and all values of an event column missing.
            if len(types - {pa.null()}) > 1 and types != {pa.int64(), pa.float64()}:
                column = name.removeprefix(EVENT_PREFIX)
                raise ValueError(
                    f"{path}: column {column!r} must have the type it has in {first_path}, {first[name].type}, found "
                    f"{table[name].type}"
                )
    return pa.concat_tables(tables.values(), promote_options="permissive")


def _hive_keys(path: Path) -> dict[str, str | None]:
    """Return the keys and values in the names of a file's folders, such as `day=2024-01-31`."""
    names = [part.partition("=")[0] for part in path.parent.parts if "=" in part]
    partitioning = ds.HivePartitioning(pa.schema({name: pa.string() for name in names}))
    keys = ds.get_partition_keys(partitioning.parse(path.as_posix()))
    return {name: keys[name] for name in names}


def _repeat(value: str | None, num_rows: int, is_id: bool) -> pa.Array:
    column = pa.repeat(pa.scalar(value, pa.string()), num_rows)
    return column.dictionary_encode().cast(TEXT_ID) if is_id else column
