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

from .encoding import TEXT_ID, encode_ids, integers_if_written_as_such, join_dictionaries
from .interactions import Interactions, check_filtered, drop_duplicates, sort_by_time


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
        timestamp_type (`pyarrow.DataType`, *optional*): int64 or float64.
        latest (`float`, *optional*): The latest timestamp.
    """

    num_rows: int
    item_ids: pa.Array
    items_as_read: pa.Array
    item_indices: np.ndarray
    user_type: pa.DataType
    first_users: pa.Array
    timestamp_type: pa.DataType | None
    latest: float | None


def survey(batches: Iterable[pa.Table]) -> Survey:
    """Look at all rows, in tables as [`~values.check_rows`] returns them."""
    num_rows, timestamp_type, latest = 0, None, None
    items, samples, types = pa.array([]), [], set()
    is_text = {}
    for batch in batches:
        users, new_items = _encode(batch["user"]), _encode(batch["item"]).dictionary
        is_text = {name: batch[name].type == TEXT_ID for name in ("user", "item")}
        items = pa.concat_arrays([items.cast(new_items.type), new_items]).unique()
        types.add((integers_if_written_as_such(users.dictionary) if is_text["user"] else users.dictionary).type)
        samples.append(users.dictionary.take(users.indices.take(pa.array(range(0, len(users), ROWS_PER_SAMPLE)))))
        num_rows += batch.num_rows
        if "timestamp" in batch.column_names:
            times = batch["timestamp"]
            timestamp_type = times.type if timestamp_type in (None, pa.int64()) else timestamp_type
            latest = max(latest or 0, pc.max(times).as_py())
    item_ids, item_indices = encode_ids(_column_of(items, is_text["item"]))
    user_type = types.pop() if len(types) == 1 else pa.large_string()
    sample = _as_type(pa.concat_arrays(samples), user_type).sort()
    num_partitions = -(-num_rows // ROWS_PER_PARTITION)
    bounds = sample.take(pa.array(np.arange(1, num_partitions) * len(sample) // num_partitions)).unique()
    first_users = bounds.filter(pc.not_equal(bounds, sample[0]))  # before the least user there is none
    return Survey(num_rows, item_ids, items, item_indices, user_type, first_users, timestamp_type, latest)


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
        raise ValueError(f"the source must not change while it is read, found {known.num_rows:,} rows, then {num_rows:,}")
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
        interactions = Interactions(user_ids, item_ids, users, rows["item"].to_numpy(), timestamps)
        sort_by_time(interactions)
        self.num_duplicates = drop_duplicates(interactions)
        self.num_rows, self.num_users = interactions.users.size, len(user_ids)
        self._kept = np.packbits(np.ones(self.num_rows, bool))
        columns = {
            "user": pa.DictionaryArray.from_arrays(interactions.users, user_ids),
            "item": interactions.items,
            "timestamp": interactions.timestamps,
        }
        table = pa.table({name: values for name, values in columns.items() if values is not None})
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def read(self) -> Interactions:
        """Return the rows that are left, with all ids."""
        with pa.memory_map(str(self.path)) as file:
            table = pa.ipc.open_file(file).read_all()
        users = join_dictionaries(table["user"])
        timestamps = table["timestamp"].to_numpy() if "timestamp" in table.column_names else None
        items = table["item"].to_numpy()
        interactions = Interactions(users.dictionary, self.item_ids, users.indices.to_numpy(), items, timestamps)
        interactions.keep(self._mask())
        return interactions

    def keep(self, rows: np.ndarray) -> None:
        """Keep of the rows that are left those of a mask."""
        mask = self._mask()
        mask[mask] = rows
        self._kept = np.packbits(mask)

    def _mask(self) -> np.ndarray:
        return np.unpackbits(self._kept, count=self.num_rows).view(bool)


def filter_partitions(partitions: Sequence[Partition], k_core: int, min_per_user: int) -> tuple[int, int]:
    """Remove users and items with too few rows, again and again until none is left in any partition.

    Returns:
        `tuple[int, int]`: how many interactions and users that removes, as [`~interactions.filter_by_count`] does.
    """
    item_counts = sum(count_rows_of_items(partition.read()) for partition in partitions)
    num_rows = sum(partition.num_rows for partition in partitions)
    num_users = sum(partition.num_users for partition in partitions)
    is_changed = True
    while is_changed:
        is_changed, num_users_left = False, 0
        for partition in partitions:
            interactions = partition.read()
            users, items = interactions.users, interactions.items
            is_enough = np.bincount(users)[users] >= max(k_core, min_per_user)
            is_enough &= item_counts[items] >= k_core
            num_users_left += np.count_nonzero(np.bincount(users))
            if not is_enough.all():
                is_changed = True
                partition.keep(is_enough)
                interactions.keep(~is_enough)
                item_counts -= count_rows_of_items(interactions)
    num_filtered, num_filtered_users = num_rows - int(item_counts.sum()), num_users - int(num_users_left)
    check_filtered(num_rows, num_filtered, num_users, num_filtered_users, k_core, min_per_user)
    return num_filtered, num_filtered_users


def count_rows_of_items(interactions: Interactions) -> np.ndarray:
    """Return how many rows each item has, of shape `(num_items,)`."""
    return np.bincount(interactions.items, minlength=len(interactions.item_ids))


def _encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return ids as read, strings of 64-bit offsets among them, over the dictionary of the distinct ones."""
    encoded = join_dictionaries(column if column.type == TEXT_ID else column.dictionary_encode())
    if column.type != TEXT_ID:
        return encoded
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.large_string()))


def _column_of(ids: pa.Array, is_text: bool) -> pa.ChunkedArray:
    """Return distinct ids as the column of a source."""
    return pa.chunked_array([ids.dictionary_encode().cast(TEXT_ID) if is_text else ids])


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
    if known.timestamp_type is not None:
        columns["timestamp"] = batch["timestamp"].cast(known.timestamp_type)
    return pa.table(columns), partitions[users.indices].astype(np.int16)
