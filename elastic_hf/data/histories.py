"""From rows (user, item, time) to checked, time-ordered histories, split for training, validation and test.

rows (user, item, time) -> sorted, without duplicates -> k-core -> one history per user -> train, validation, test
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value

from .cache import move_to_content_name, temporary_folder
from .columns import RESERVED_NAMES, ColumnRequest
from .encoding import decode_events, encode_ids
from .interactions import (
    MIN_INTERACTIONS,
    Interactions,
    drop_duplicates,
    encode_rows,
    filter_by_count,
    sort_by_time,
    warn_of_milliseconds,
)
from .sources import read_source, read_titles
from .splits import (
    Prefixes,
    count_items,
    count_seen_targets,
    flat_indices,
    leave_one_out,
    leave_out_short,
    temporal,
    warn_of_few_users,
)


logger = logging.getLogger(__name__)

SPLITS = ("leave_one_out", "temporal", "none")
USERS_PER_BATCH = 1_000  # rows of one Arrow record batch


class Histories(NamedTuple):
    """
    What [`load_histories`] returns.

    Attributes:
        histories (`DatasetDict`):
            Splits `train`, `validation` and `test`, memory-mapped, one row per user: `user_id`, `item_ids` (oldest
            first), `timestamps` (Unix seconds, as long as `item_ids`; only where the source has time), the event
            columns asked for (as long as `item_ids`, too) and, in `validation` and `test`, `target`: the item to
            predict after `item_ids`, and its `target_timestamp`.
        items (`Dataset`):
            One row per item, sorted by `item_id`: `item_id`, `title` (null where unknown) and `count` (interactions to
            train on, also those of users who are left out of `train`).
        counts (`dict[str, int]`):
            `num_rows` (read from the source), `num_users`, `num_items` and `num_interactions` (after all filters),
            `num_duplicates` (exact duplicates dropped), `num_filtered` and `num_filtered_users` (removed interactions
            and users, of users and items with too few), `num_train_users`, `num_validation_users` and `num_test_users`
            (rows of the splits). `num_rows` is the sum of `num_interactions`, `num_duplicates` and `num_filtered`.
            Where something is held out, `num_seen_targets`: how many users of `validation` had their target before.
            Where that is a large share, users come back to items: set `exclude_seen=False` in the configuration.
    """

    histories: DatasetDict
    items: Dataset
    counts: dict[str, int]


def load_histories(
    source: Any,
    *,
    data_dir: str | os.PathLike | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    title_column: str | None = None,
    event_columns: Sequence[str] = (),
    column_names: Sequence[str] | None = None,
    in_time_order: bool = False,
    items_file: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    k_core: int = 5,
    split: str = "leave_one_out",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    validation_users: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Histories:
    """
    Read interactions, check them and return every user's history, split for training, validation and test.

    The rules, in the order in which they apply:

    1. Rows with a null user, item or timestamp, or with a negative or non-finite timestamp, are errors.
    2. A user's rows are ordered by time; rows with equal timestamps, and all rows of a source without time, keep the
       order in which the source has them.
    3. Rows equal in user, item and timestamp are one interaction: the first is kept, the others are counted in
       `counts["num_duplicates"]` and reported as a warning, whatever their event columns hold. A source without time
       keeps its repeats.
    4. Users with fewer than `k_core` or three interactions (one, where nothing is held out) and items with fewer than
       `k_core` are removed, again and again until none is left, and counted in `counts["num_filtered_users"]` and
       `counts["num_filtered"]`.
    5. Users with fewer than two items to train on are left out of `train`, since there is nothing to predict, but not
       of `validation` and `test`.

    Args:
        source (`str`, `os.PathLike`, a list of them, or a table):
            One of

            - a built-in dataset: `"synthetic"`, or `"ml-100k"`, `"ml-1m"`, `"ml-20m"`, `"ml-25m"` or
              `"ml-latest-small"`, downloaded from GroupLens;
            - a table: a `datasets.Dataset`, `pandas.DataFrame` (pandas 2.2 or later), `polars.DataFrame`,
              `pyarrow.Table`, or anything else that hands its columns on as Arrow;
            - a file: `.csv`, `.tsv`, `.txt`, `.jsonl`, `.ndjson` or `.json` (one object per line), also compressed
              (`.gz`, `.zst`, `.bz2`, `.lz4`), or `.parquet`. Text may be divided by `,`, `;`, tabs or `|`. A `.txt`
              file without header holds lines of `user item` in time order;
            - a folder of such files, all of one kind, with its subfolders: they are read in the order of their names,
              and folders such as `day=2024-01-31` are a column. A file that cannot be read is an error;
            - a pattern, such as `"logs/2024-*.csv.gz"`, or a list of files, folders and patterns;
            - a folder that `save_to_disk` of `datasets` wrote;
            - a folder with raw MovieLens files: `u.data` and `u.item`, `ratings.dat` and `movies.dat`, or
              `ratings.csv` and `movies.csv`;
            - a dataset on the Hub, as `"org/name"`.
        data_dir (`str` or `os.PathLike`, *optional*):
            A folder with the raw files of the MovieLens dataset that `source` names; nothing is downloaded then.
        user_column, item_column, timestamp_column (`str`, *optional*):
            Columns of the source. If not given, they are `user_id`, `item_id` and `timestamp` or, where these are
            missing, the one column with another common name, such as `userId`, `movieId` or `time`, which is reported.
            Ids are integers or strings and stay so; integers may be written as floats or decimals (10.0 is 10). In
            text files they are integers if all of a column are written as such (`007` is not). Timestamps are Unix
            seconds, integers or floats. Dates, datetimes and ISO 8601 strings become Unix seconds, in UTC where they
            name no zone, and integers where no row has a fraction of a second.
        title_column (`str`, *optional*):
            Column of the source with the items' titles; an item's first title counts.
        event_columns (`Sequence[str]`, *optional*):
            Columns of the source with what else is known of each interaction, such as a rating or an action: strings,
            booleans, integers or finite numbers, null where nothing is known. In text files they are integers, numbers
            or booleans if all of a column are written as such.
        column_names (`Sequence[str]`, *optional*):
            All columns of text files that have no header.
        in_time_order (`bool`, *optional*, defaults to `False`):
            Set it if the source has no timestamps and its rows come in time order, the oldest first.
        items_file (`str` or `os.PathLike`, *optional*):
            A file with titles: `u.item`, `movies.dat`, or any file with a header of the kinds above with the columns
            `item_id` and `title`, or other common names of them. It replaces the titles that come with a source.
        dataset_config_name (`str`, *optional*):
            The configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split of a Hub dataset, or of a `datasets.DatasetDict`, that holds the interactions.
        k_core (`int`, *optional*, defaults to 5):
            The least number of interactions of every user and item; 0 keeps all items, and all users with three.
        split (`str`, *optional*, defaults to `"leave_one_out"`):
            `"leave_one_out"`: a user's last item is the test target, the second last the validation target, and the
            items before both are for training. `"temporal"`: two cutoffs in time, the same for all users. Interactions
            before the first are for training; a user with an interaction between the cutoffs is in `validation`, one
            with an interaction at or after the second in `test`. The target is the user's first item there, and the
            history all items before it. Users without history before the cutoff are left out of a split and reported.
            `"none"`: `train` alone, with the whole histories of all users, and nothing to evaluate on.
        validation_fraction, test_fraction (`float`, *optional*, default to 0.1):
            Shares of the interactions, the latest for test, that set the cutoffs of the temporal split.
        validation_users (`int`, *optional*):
            With `"leave_one_out"`, so many users, drawn at random, have a validation target; all others train on their
            second last item, too. The draw has a seed of its own, 42, whatever the seed of a training: the same data
            always have the same validation users. If not given, all users have a validation target.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where downloads and the result's Arrow files are kept; a folder in the cache of `datasets` if not given.

    Returns:
        [`Histories`]: the histories, the items and the counts.

    Raises:
        ValueError: if an argument or the source's content is not as described; the message names the file and the
            line, row or column.
        OSError: if a download fails.
    """
    _check_arguments(split, k_core, validation_fraction, test_fraction, validation_users)
    if title_column is not None and items_file is not None:
        raise ValueError("title_column and items_file both give titles: set only one of them")
    if isinstance(column_names, str):
        raise ValueError(f"column_names must be a list of all columns, found {column_names!r}")
    if isinstance(event_columns, str) or len({*event_columns}) < len(event_columns):
        raise ValueError(f"event_columns must be a list of distinct columns, found {event_columns!r}")
    reserved = [name for name in event_columns if name in RESERVED_NAMES]
    if reserved:
        raise ValueError(f"event_columns must not be called {', '.join(RESERVED_NAMES)}, found {reserved[0]!r}")
    if cache_dir is None:
        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "elastic_hf"
    cache_dir = Path(cache_dir)
    request = _request_columns(
        user_column, item_column, timestamp_column, title_column, tuple(event_columns), in_time_order
    )

    table, titles = read_source(source, request, column_names, data_dir, dataset_config_name, dataset_split, cache_dir)
    if items_file is not None:
        titles = read_titles(Path(items_file))
    if split == "temporal" and "timestamp" not in table.column_names:
        raise ValueError("split='temporal' needs timestamps, the source has none")
    interactions = encode_rows(table)
    if title_column is not None:
        titles = _first_titles(interactions.items, interactions.item_ids, table["title"])
    elif titles is not None:
        ids, codes = encode_ids(titles["item"])
        titles = _first_titles(codes, ids, titles["title"])
    num_rows = table.num_rows
    del table

    warn_of_milliseconds(interactions)
    sort_by_time(interactions)
    num_duplicates = drop_duplicates(interactions)
    min_per_user = 1 if split == "none" else MIN_INTERACTIONS
    num_filtered, num_filtered_users = filter_by_count(interactions, k_core, min_per_user)
    lengths = np.bincount(interactions.users)
    if split == "none":
        prefixes = {"train": (np.arange(lengths.size), lengths)}
    elif split == "leave_one_out":
        prefixes = leave_one_out(lengths, validation_users)
    else:
        prefixes = temporal(interactions, lengths, validation_fraction, test_fraction)
    item_counts = count_items(interactions, lengths, prefixes["train"])
    seen_targets = {}
    if split != "none":
        seen_targets["num_seen_targets"] = count_seen_targets(interactions, lengths, prefixes["validation"])
        num_targets = prefixes["validation"][0].size
        share = seen_targets["num_seen_targets"] / num_targets
        logger.info(f"{share:.1%} of the {num_targets:,} validation targets are items that the user had before")
        prefixes["train"] = leave_out_short(prefixes["train"])
        warn_of_few_users(prefixes)

    with temporary_folder(cache_dir) as temporary:
        _write_items(temporary, interactions.item_ids, item_counts, titles)
        _write_splits(temporary, interactions, lengths, prefixes)
        folder = move_to_content_name(temporary, cache_dir, "histories")
    return Histories(
        DatasetDict({name: Dataset.from_file(str(folder / f"{name}.arrow"), split=name) for name in prefixes}),
        items=Dataset.from_file(str(folder / "items.arrow")),
        counts={
            "num_rows": num_rows,
            "num_users": len(interactions.user_ids),
            "num_items": len(interactions.item_ids),
            "num_interactions": interactions.users.size,
            "num_duplicates": num_duplicates,
            "num_filtered": num_filtered,
            "num_filtered_users": num_filtered_users,
            **{f"num_{name}_users": rows.size for name, (rows, _) in prefixes.items()},
            **seen_targets,
        },
    )


def _check_arguments(
    split: str,
    k_core: int,
    validation_fraction: float,
    test_fraction: float,
    validation_users: int | None,
) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, found {split!r}")
    if not isinstance(k_core, int) or k_core < 0:
        raise ValueError(f"k_core must be an integer of at least 0, found {k_core!r}")
    if split == "temporal" and not (
        validation_fraction > 0 and test_fraction > 0 and validation_fraction + test_fraction < 1
    ):
        raise ValueError(
            "validation_fraction and test_fraction must be positive and sum to less than 1, "
            f"found {validation_fraction} and {test_fraction}"
        )
    if validation_users is None:
        return
    if isinstance(validation_users, bool) or not isinstance(validation_users, int) or validation_users < 1:
        raise ValueError(f"validation_users must be an integer of at least 1, found {validation_users!r}")
    if split != "leave_one_out":
        raise ValueError(f"validation_users must be given with split='leave_one_out' alone, found split={split!r}")


def _request_columns(
    user: str | None,
    item: str | None,
    timestamp: str | None,
    title: str | None,
    events: tuple[str, ...],
    in_time_order: bool,
) -> ColumnRequest:
    if in_time_order and timestamp is not None:
        raise ValueError(
            f"in_time_order is for a source without timestamps: leave it out, or timestamp_column={timestamp!r}"
        )
    names = {"user": user, "item": item, "timestamp": timestamp, "title": title}
    names = {role: name for role, name in names.items() if name is not None}
    return ColumnRequest(names, ("user", "item") if in_time_order else ("user", "item", "timestamp"), events)


def _write_splits(
    folder: Path, interactions: Interactions, lengths: np.ndarray, prefixes: dict[str, Prefixes]
) -> None:
    """Write one Arrow file for each split."""
    user_type, item_type = Value(str(interactions.user_ids.type)), Value(str(interactions.item_ids.type))
    starts = np.cumsum(lengths) - lengths
    for name, (rows, prefix_lengths) in prefixes.items():
        features = {"user_id": user_type, "item_ids": List(item_type)}
        if interactions.timestamps is not None:
            is_integer = interactions.timestamps.dtype == np.int64
            features["timestamps"] = List(Value("int64" if is_integer else "float64"))
        for column, values in interactions.events.items():
            features[column] = List(Value(str(decode_events(values[:0]).type)))
        if name != "train":
            features["target"] = item_type
            if "timestamps" in features:
                features["target_timestamp"] = features["timestamps"].feature
        batches = _history_batches(interactions, starts, rows, prefix_lengths, with_target=name != "train")
        _write_arrow(folder / f"{name}.arrow", Features(features), batches)


def _history_batches(
    interactions: Interactions, starts: np.ndarray, rows: np.ndarray, prefix_lengths: np.ndarray, with_target: bool
) -> Iterator[dict[str, pa.Array]]:
    """Yield for the users `rows` the first `prefix_lengths` of their interactions, and the item that comes next."""
    items, item_ids = interactions.items, interactions.item_ids
    for first in range(0, rows.size, USERS_PER_BATCH):
        batch_rows = rows[first : first + USERS_PER_BATCH]
        lengths = prefix_lengths[first : first + USERS_PER_BATCH]
        indices = flat_indices(starts[batch_rows], lengths)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        batch = {
            "user_id": interactions.user_ids.take(pa.array(batch_rows)),
            "item_ids": pa.ListArray.from_arrays(offsets, item_ids.take(pa.array(items[indices]))),
        }
        if interactions.timestamps is not None:
            batch["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(interactions.timestamps[indices]))
        for name, values in interactions.events.items():
            batch[name] = pa.ListArray.from_arrays(offsets, decode_events(values.take(pa.array(indices))))
        if with_target:
            targets = starts[batch_rows] + lengths
            batch["target"] = item_ids.take(pa.array(items[targets]))
            if interactions.timestamps is not None:
                batch["target_timestamp"] = pa.array(interactions.timestamps[targets])
        yield batch


def _write_items(folder: Path, item_ids: pa.Array, counts: np.ndarray, titles: pa.Table | None) -> None:
    """Write the Arrow file of the items."""
    columns = {"item_id": item_ids, "title": _align_titles(item_ids, titles), "count": pa.array(counts)}
    features = {"item_id": Value(str(item_ids.type)), "title": Value("string"), "count": Value("int64")}
    _write_arrow(folder / "items.arrow", Features(features), [columns])


def _write_arrow(path: Path, features: Features, batches: Iterable[dict[str, pa.Array]]) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch, schema=schema))


def _first_titles(items: np.ndarray, item_ids: pa.Array, titles: pa.ChunkedArray) -> pa.Table:
    """Return the first title of each item that has one, of rows with the item `item_ids[items]`."""
    rows = np.flatnonzero(titles.is_valid())
    first = np.full(len(item_ids), -1)
    first[items[rows[::-1]]] = rows[::-1]  # of several values for one index the last one stays, here the earliest row
    known = first >= 0
    return pa.table({"item": item_ids.filter(pa.array(known)), "title": titles.take(pa.array(first[known]))})


def _align_titles(item_ids: pa.Array, titles: pa.Table | None) -> pa.Array:
    """Return the title of each item, null where there is none."""
    if titles is None:
        return pa.nulls(len(item_ids), pa.string())
    try:
        ids = titles["item"].cast(pa.string()).cast(item_ids.type)
    except pa.ArrowInvalid as error:
        raise ValueError(f"the titles' item ids are not of the interactions' type {item_ids.type}: {error}") from error
    rows = pc.index_in(item_ids, ids)
    if rows.null_count:
        logger.warning(f"{rows.null_count:,} of {len(item_ids):,} items have no title")
    found = titles["title"].cast(pa.string()).take(rows)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
