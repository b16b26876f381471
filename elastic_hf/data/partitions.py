"""Interactions that do not fit into memory, in partitions on disk that do: each holds all rows of a range of users.

rows -> survey of the ids -> partitions -> each sorted, without duplicates -> k-core over all of them
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import EVENT_PREFIX
from .encoding import TEXT_ID, cast_if_all, encode_ids, integers_if_written_as_such, join_dictionaries
from .interactions import Interactions, check_filtered, drop_duplicates, encode_event_columns, sort_by_time


# What event columns of text may stand for, as in [`~encoding.encode_events`].
TEXT_TYPES = (pa.int64(), pa.float64(), pa.bool_(), pa.large_string())
ROWS_PER_PARTITION = 2**22  # about; all rows of a user are in one
ROWS_PER_SAMPLE = 64  # of so many rows the user of one is looked at, to find ranges of users with as many rows


@dataclass
class Survey:
    """
    What has to be known of all rows before they are partitioned.

    Attributes:
        num_rows (`int`): Their number.
        item_ids (`pyarrow.Array`): The distinct item ids, sorted.
        items_as_read (`pyarrow.Array`): The distinct items as the source has them: the strings of text files.
        item_indices (`np.ndarray`): The index of each of these in `item_ids`.
        user_type (`pyarrow.DataType`): int64 or strings.
        first_users (`pyarrow.Array`): The least user id of each partition but the first one, sorted.
        types (`dict[str, pyarrow.DataType]`): Those of the timestamps, where there is time, and of the event columns.
        latest (`float`, *optional*): The latest timestamp.
    """

    num_rows: int
    item_ids: pa.Array
    items_as_read: pa.Array
    item_indices: np.ndarray
    user_type: pa.DataType
    first_users: pa.Array
    types: dict[str, pa.DataType]
    latest: float | None


def survey(batches: Iterable[pa.Table]) -> Survey:
    """Look at all rows, in tables as [`~values.check_rows`] returns them."""
    num_rows, latest = 0, None
    items, samples, user_types, possible = pa.array([]), [], set(), {}
    is_text = {}
    for batch in batches:
        users, new_items = _encode(batch["user"]), _encode(batch["item"]).dictionary
        is_text = {name: batch[name].type == TEXT_ID for name in ("user", "item")}
        items = pa.concat_arrays([items.cast(new_items.type), new_items]).unique()
        user_types.add((integers_if_written_as_such(users.dictionary) if is_text["user"] else users.dictionary).type)
        samples.append(users.dictionary.take(users.indices.take(pa.array(range(0, len(users), ROWS_PER_SAMPLE)))))
        num_rows += batch.num_rows
        if "timestamp" in batch.column_names:
            latest = max(latest or 0, pc.max(batch["timestamp"]).as_py())
        for name in batch.column_names:
            if name not in ("user", "item"):
                fitting = _possible_types(batch[name])
                possible[name] = [type_ for type_ in possible.get(name, fitting) if type_ in fitting]
    item_ids, item_indices = encode_ids(_column_of(items, is_text["item"]))
    user_type = user_types.pop() if len(user_types) == 1 else pa.large_string()
    sample = _as_type(pa.concat_arrays(samples), user_type).sort()
    types = {name: fitting[0] for name, fitting in possible.items()}
    num_partitions = -(-num_rows // ROWS_PER_PARTITION)
    bounds = sample.take(pa.array(np.arange(1, num_partitions) * len(sample) // num_partitions)).unique()
    first_users = bounds.filter(pc.not_equal(bounds, sample[0]))  # before the least user there is none
    return Survey(num_rows, item_ids, items, item_indices, user_type, first_users, types, latest)


def partition_rows(batches: Iterable[pa.Table], known: Survey, folder: Path) -> list[Path]:
    """Write the rows of each range of users, in the order of the source, and return the files, the first users first.

    Raises:
        ValueError: if they are not the rows that were surveyed.
    """
    paths = [folder / f"{index:05d}.arrows" for index in range(len(known.first_users) + 1)]
    compression = pa.ipc.IpcWriteOptions(compression="zstd")
    num_rows, writers = 0, []
    with ExitStack() as stack:
        for batch in batches:
            rows, partitions = _encode_batch(batch, known)
            writers = writers or [
                stack.enter_context(pa.ipc.new_stream(str(path), rows.schema, options=compression)) for path in paths
            ]
            order = np.argsort(partitions, kind="stable")
            rows = rows.take(pa.array(order))
            ends = np.searchsorted(partitions[order], np.arange(len(paths)), side="right")
            for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
                if start < end:
                    writer.write_table(rows.slice(start, end - start))
            num_rows += batch.num_rows
    if num_rows != known.num_rows:
        raise ValueError(
            f"the source must not change while it is read, found {known.num_rows:,} rows, then {num_rows:,}"
        )
    return paths


class Partition:
    """
    The rows of a range of users, sorted by user and time, without duplicates, in a memory-mapped file.

    Attributes:
        num_rows, num_users (`int`): Before any of them is removed.
        num_duplicates (`int`): Rows that were dropped.
    """

    def __init__(self, path: Path, item_ids: pa.Array) -> None:
        """Sort the rows of a file that [`partition_rows`] wrote, and replace it."""
        self.path, self.item_ids = path.with_suffix(".arrow"), item_ids
        with pa.OSFile(str(path)) as file:
            rows = pa.ipc.open_stream(file).read_all()
        path.unlink()
        user_ids, users = encode_ids(rows["user"])
        timestamps = rows["timestamp"].to_numpy() if "timestamp" in rows.column_names else None
        events = encode_event_columns(rows)
        interactions = Interactions(user_ids, item_ids, users, rows["item"].to_numpy(), timestamps, events)
        del rows
        sort_by_time(interactions)
        self.num_duplicates = drop_duplicates(interactions)
        self.num_rows, self.num_users = interactions.users.size, len(user_ids)
        self._kept = np.packbits(np.ones(self.num_rows, bool))
        columns = {
            "user": pa.DictionaryArray.from_arrays(interactions.users, user_ids),
            "item": interactions.items,
            **({} if timestamps is None else {"timestamp": interactions.timestamps}),
            **{EVENT_PREFIX + name: values for name, values in interactions.events.items()},
        }
        batch = pa.record_batch(columns)
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)

    def read(self) -> Interactions:
        """Return the rows that are left, with all ids."""
        batch = self._map()
        names = batch.schema.names
        interactions = Interactions(
            user_ids=batch["user"].dictionary,
            item_ids=self.item_ids,
            users=batch["user"].indices.to_numpy(),
            items=batch["item"].to_numpy(),
            timestamps=batch["timestamp"].to_numpy() if "timestamp" in names else None,
            events={name.removeprefix(EVENT_PREFIX): batch[name] for name in names if name.startswith(EVENT_PREFIX)},
        )
        interactions.keep(self._mask())
        return interactions

    def read_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the users and the items of the rows that are left, as [`read`] does, and copy nothing else."""
        batch, mask = self._map(), self._mask()
        return batch["user"].indices.to_numpy()[mask], batch["item"].to_numpy()[mask]

    def keep(self, rows: np.ndarray) -> None:
        """Keep of the rows that are left those of a mask."""
        mask = self._mask()
        mask[mask] = rows
        self._kept = np.packbits(mask)

    def _map(self) -> pa.RecordBatch:
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).get_batch(0)

    def _mask(self) -> np.ndarray:
        return np.unpackbits(self._kept, count=self.num_rows).view(bool)


def filter_partitions(partitions: Sequence[Partition], k_core: int, min_per_user: int) -> tuple[int, int, np.ndarray]:
    """Remove users and items with too few rows, again and again until none is left in any partition.

    Returns:
        `tuple[int, int, np.ndarray]`: how many interactions and users that removes, as
            [`~interactions.filter_by_count`] does, and how many rows of each item are left, of shape `(num_items,)`.
    """
    item_counts = np.zeros(len(partitions[0].item_ids), np.int64)
    for partition in partitions:
        item_counts += np.bincount(partition.read_codes()[1], minlength=item_counts.size)
    num_rows = sum(partition.num_rows for partition in partitions)
    num_users = sum(partition.num_users for partition in partitions)
    is_changed = True
    while is_changed:
        is_changed, num_users_left = False, 0
        for partition in partitions:
            users, items = partition.read_codes()
            is_enough = np.bincount(users)[users] >= max(k_core, min_per_user)
            is_enough &= item_counts[items] >= k_core
            num_users_left += np.count_nonzero(np.bincount(users))
            if not is_enough.all():
                is_changed = True
                partition.keep(is_enough)
                item_counts -= np.bincount(items[~is_enough], minlength=item_counts.size)
    num_filtered, num_filtered_users = num_rows - int(item_counts.sum()), num_users - int(num_users_left)
    check_filtered(num_rows, num_filtered, num_users, num_filtered_users, k_core, min_per_user)
    return num_filtered, num_filtered_users, item_counts


def _encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return ids as read, strings of 64-bit offsets among them, over the dictionary of the distinct ones."""
    encoded = join_dictionaries(column if column.type == TEXT_ID else column.dictionary_encode())
    if column.type != TEXT_ID:
        return encoded
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.large_string()))


def _column_of(ids: pa.Array, is_text: bool) -> pa.ChunkedArray:
    """Return distinct ids as the column of a source."""
    return pa.chunked_array([ids.dictionary_encode().cast(TEXT_ID) if is_text else ids])


def _possible_types(column: pa.ChunkedArray) -> list[pa.DataType]:
    """Return the types that the values of a column may have, the first of them if no other batch says otherwise."""
    if column.type == TEXT_ID:
        text = join_dictionaries(column).dictionary
        return [type_ for type_ in TEXT_TYPES if cast_if_all(text, type_) is not None]
    if pa.types.is_null(column.type):
        return [pa.null(), *TEXT_TYPES]
    return [column.type, pa.float64()] if pa.types.is_integer(column.type) else [column.type]


def _as_type(ids: pa.Array, id_type: pa.DataType) -> pa.Array:
    return integers_if_written_as_such(ids) if ids.type != id_type else ids


def _encode_batch(batch: pa.Table, known: Survey) -> tuple[pa.Table, np.ndarray]:
    """Return rows with their user's id and their item's index, and the partition of each."""
    users, items = _encode(batch["user"]), _encode(batch["item"])
    user_ids = _as_type(users.dictionary, known.user_type)
    bounds = known.first_users.to_numpy(zero_copy_only=False)
    partitions = np.searchsorted(bounds, user_ids.to_numpy(zero_copy_only=False), side="right")
    indices = pc.index_in(items.dictionary, value_set=known.items_as_read)
    if indices.null_count:
        new = items.dictionary.filter(indices.is_null())[0].as_py()
        raise ValueError(f"the source must not change while it is read, found {new!r}, an item that was not there")
    columns = {"user": user_ids.take(users.indices), "item": known.item_indices[indices.to_numpy()[items.indices]]}
    columns |= {name: _cast(batch[name], type_) for name, type_ in known.types.items()}
    return pa.table(columns), partitions[users.indices].astype(np.int16)


def _cast(column: pa.ChunkedArray, type_: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Return the values of a column, text included, in a type that holds all of them."""
    if column.type != TEXT_ID:
        return column.cast(type_)
    encoded = join_dictionaries(column)
    return encoded.dictionary.cast(type_).take(encoded.indices)
