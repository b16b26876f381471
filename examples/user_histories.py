"""From files of histories or interactions to the histories of the users of one partition after another."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from elastic_hf.data.columns import EVENT_PREFIX, ColumnRequest, Columns, check_columns
from elastic_hf.data.encoding import decode_events
from elastic_hf.data.interactions import (
    drop_duplicates,
    encode_rows,
    sort_by_time,
    warn_of_duplicates,
    warn_of_milliseconds,
)
from elastic_hf.data.values import check_rows
from storage import File, find_place, list_files


DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROWS_PER_BATCH, HISTORIES_PER_BATCH = 65_536, 1_024


@dataclass
class Source:
    """The files of the input and what their columns mean; histories have no `columns.item`, and lists of events."""

    filesystem: fs.FileSystem
    files: list[File]
    columns: Columns
    has_timestamps: bool

    @property
    def is_histories(self) -> bool:
        return self.columns.item is None

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def lists(self) -> list[str]:
        """The columns that hold a list for each user."""
        if not self.is_histories:
            return []
        return ["item_ids", *(["timestamps"] if self.has_timestamps else []), *self.columns.events]

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [*dict.fromkeys([*self.columns.wanted(), *self.lists])]

    def describe(self) -> dict[str, Any]:
        """Return what tells this input from another one, or from its files before they changed."""
        return {
            "files": [[file.path, file.size, file.mtime_ns] for file in self.files],
            "columns": self.names,
        }

    def pieces(self) -> list[dict[str, Any]]:
        """Return what is read by one task each: the row groups of Parquet files, and other files."""
        pieces = []
        for number, file in enumerate(self.files):
            first_row = 0
            if file.suffix in DELIMITERS:
                pieces.append({"file": number, "row_group": -1, "first_row": 0})
                continue
            metadata = pq.read_metadata(file.path, filesystem=self.filesystem)
            for row_group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(row_group).num_rows
                if num_rows:
                    pieces.append({"file": number, "row_group": row_group, "first_row": first_row})
                first_row += num_rows
        if not pieces:
            others = f", nor has any of the other {len(self.files) - 1:,} files" if len(self.files) > 1 else ""
            raise ValueError(f"{self.files[0].path} has no rows{others}")
        return pieces


def find_source(source: str, names: dict[str, str], events: tuple[str, ...] = ()) -> Source:
    """Return the files of a file or folder, with their columns.

    Args:
        source (`str`): A file or a folder, by its path or URI.
        names (`dict[str, str]`): Columns by their role; common names are recognised where it does not say.
        events (`tuple[str]`): Columns of features of events.

    Raises:
        ValueError: if there is no such file, there are files of two kinds, or a column is missing.
    """
    filesystem, path = find_place(source, "input")
    files = list_files(filesystem, path)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= {".parquet", *DELIMITERS}:
        raise ValueError(
            f"input must be a file or a folder of files that all end in one of .parquet, {', '.join(DELIMITERS)}, "
            f"found {source!r} with {', '.join(sorted(kinds)) or 'no file'}"
        )
    first = _schema_of(filesystem, files[0])
    if "item_ids" in first.names and "item" not in names:
        request = ColumnRequest({role: name for role, name in names.items() if role == "user"}, ("user",), events)
        source = Source(filesystem, files, request.find(first.names, files[0].path), "timestamps" in first.names)
    else:
        columns = ColumnRequest(names, events=events).find(first.names, files[0].path)
        source = Source(filesystem, files, columns, True)
    for file in files[1:]:
        schema = _schema_of(filesystem, file)
        check_columns(schema.names, source.names, file.path)
        for name in source.names:
            wanted, found = first.field(name).type, schema.field(name).type
            if file.suffix == ".parquet" and found != wanted:
                raise ValueError(
                    f"{file.path}: column {name!r} must have the type it has in {files[0].path}, {wanted}, "
                    f"found {found}"
                )
    return source


def _schema_of(filesystem: fs.FileSystem, file: File) -> pa.Schema:
    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file.path, filesystem=filesystem)
        with _open_text(filesystem, file) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path}: {error}") from error


def _open_text(
    filesystem: fs.FileSystem, file: File, convert_options: pa.csv.ConvertOptions | None = None
) -> pa.csv.CSVStreamingReader:
    delimiter = pa.csv.ParseOptions(delimiter=DELIMITERS[file.suffix])
    stream = filesystem.open_input_stream(file.path)
    return pa.csv.open_csv(stream, parse_options=delimiter, convert_options=convert_options)


def read_piece(piece: pa.Table, source: Source, num_partitions: int, done: list[int]) -> Iterator[pa.Table]:
    """Yield the rows of a piece, checked, with their `partition`, but for those of partitions that are `done`.

    `position` is their place in the input: of rows with the same time, the first in the input comes first.

    Raises:
        ValueError: if a value is missing or is not what its column holds; the message names the file and the row.
    """
    (values,) = piece.to_pylist()
    file, first_row = source.files[values["file"]], values["first_row"]
    for batch in _read_batches(source, file, values["row_group"]):
        table = pa.table(batch)

        def position(row: int, first_row: int = first_row) -> str:
            return f"row {first_row + row + 1}"

        columns = source.columns._replace(events=()) if source.is_histories else source.columns
        rows = check_rows(table, columns, file.path, position)
        if source.is_histories:
            for name in source.lists:
                if table[name].null_count:
                    raise ValueError(f"{file.path}: {name} must be lists, found {table[name].null_count} nulls")
                prefix = EVENT_PREFIX if name in source.columns.events else ""
                rows = rows.append_column(prefix + name, table[name])
        else:
            rows = rows.set_column(2, "timestamp", rows["timestamp"].cast(pa.float64()))
        places = (values["file"] << 40) + first_row + np.arange(len(rows))
        partitions = partition_of(rows["user"], num_partitions)
        rows = rows.append_column("position", pa.array(places)).append_column("partition", pa.array(partitions))
        first_row += len(rows)
        yield rows.filter(pa.array(~np.isin(partitions, done)))


def _read_batches(source: Source, file: File, row_group: int) -> Iterator[pa.RecordBatch]:
    names = source.names
    if row_group >= 0:
        table = pq.ParquetFile(file.path, filesystem=source.filesystem, pre_buffer=False)
        num_rows = HISTORIES_PER_BATCH if source.is_histories else ROWS_PER_BATCH
        yield from table.iter_batches(num_rows, row_groups=[row_group], columns=names)
        return
    text = pa.csv.ConvertOptions(
        include_columns=names,
        column_types=dict.fromkeys(names, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    try:
        yield from _open_text(source.filesystem, file, text)
    except pa.ArrowException as error:
        raise ValueError(f"{file.path}: {error}") from error


def partition_of(users: pa.ChunkedArray, num_partitions: int) -> np.ndarray:
    """Return the partition of each user, the same on every machine and for the id 7 as for "7": (num_users,)."""
    encoded = users.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    hashes = [zlib.crc32(str(user).encode()) for user in encoded.dictionary.to_pylist()]
    return (np.array(hashes, dtype=np.int64) % num_partitions)[encoded.indices.to_numpy()].astype(np.int32)


def histories_of(rows: pa.Table, partition: int) -> pa.Table:
    """Return the histories of the users of a partition, in the order of their ids: `user_id`, `item_ids` and, where
    there are any, `timestamps` and features of events.

    Raises:
        ValueError: if a user has two rows of histories.
    """
    rows = rows.sort_by("position")
    if "item_ids" not in rows.column_names:
        interactions = encode_rows(rows)
        warn_of_milliseconds(interactions.timestamps.max())
        sort_by_time(interactions)
        warn_of_duplicates(drop_duplicates(interactions))
        offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(interactions.users))]), pa.int32())
        items = interactions.item_ids.take(pa.array(interactions.items))
        events = {"item_ids": items, "timestamps": pa.array(interactions.timestamps)}
        events |= {name: decode_events(values) for name, values in interactions.events.items()}
        lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in events.items()}
        return pa.table({"user_id": interactions.user_ids, **lists})
    rows = rows.rename_columns({"user": "user_id"}).sort_by("user_id")
    users = rows["user_id"]
    repeated = pc.equal(users[1:], users[:-1])
    if pc.any(repeated).as_py():
        user = users[1:].filter(repeated)[0].as_py()
        raise ValueError(f"partition {partition}: histories must be of distinct users, found {user!r} more than once")
    if pa.types.is_large_string(users.type):
        rows = rows.set_column(rows.column_names.index("user_id"), "user_id", users.cast(pa.string()))
    rows = rows.drop_columns(["position", "partition"])
    return rows.rename_columns([name.removeprefix(EVENT_PREFIX) for name in rows.column_names])
