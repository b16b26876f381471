"""From files of interactions that do not fit into memory to a folder of histories, by way of partitions on disk."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from .cache import temporary_folder
from .encoding import drop_unused, encode_ids
from .histories import (
    check_arguments,
    check_column_names,
    first_titles,
    history_batches,
    history_features,
    item_rows,
    request_columns,
)
from .interactions import MIN_INTERACTIONS, warn_of_duplicates, warn_of_milliseconds
from .partitions import Partition, filter_partitions, partition_rows, survey
from .prepared_folder import write_items, write_preparation, write_shard
from .readers import iterate_files
from .sources import find_files, read_titles
from .splits import Prefixes, count_items, count_seen_targets, leave_one_out, leave_out_short, warn_of_few_users


logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 2**20  # read at once


def prepare_histories(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    column_names: Sequence[str] | None = None,
    in_time_order: bool = False,
    event_columns: Sequence[str] = (),
    items_file: str | os.PathLike | None = None,
    k_core: int = 5,
    split: str = "leave_one_out",
    validation_users: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, int]:
    """
    Write the histories of [`load_histories`] to a folder of Parquet shards, without holding all rows in memory.

    The rows are read twice: once for the ids, once to part them on disk by ranges of users, each of which is then
    sorted and split in memory. Rules, order, errors and counts are those of [`load_histories`]. What has to fit into
    memory: four million rows, the longest history, the item ids and titles, and the lengths of all histories. Parquet
    files are read in batches; text files and JSON Lines whole, one at a time.

    Args:
        source (`str`, `os.PathLike` or a list of them): Files, folders or patterns, as in [`load_histories`].
        output_dir (`str` or `os.PathLike`):
            A folder that does not exist or is empty. It gets the Parquet shards of every split, `items.parquet` and
            `preparation.json`. [`load_histories`] loads it, memory-mapped, or as streams with `streaming=True`.
        user_column, item_column, timestamp_column, column_names, in_time_order, event_columns, items_file, k_core,
        validation_users:
            As in [`load_histories`].
        split (`str`, *optional*, defaults to `"leave_one_out"`):
            `"leave_one_out"` or `"none"`, as in [`load_histories`].

        cache_dir (`str` or `os.PathLike`, *optional*):
            Where the ranges are kept meanwhile, about 20 bytes a row; the folder that holds `output_dir` if not given.

    Returns:
        `dict[str, int]`: `counts` of [`~histories.Histories`].

    Raises:
        ValueError: as [`load_histories`] does; if `split` is `"temporal"`; if `output_dir` is not empty; if the source
            changes while it is read.
    """
    if split == "temporal":
        raise ValueError("split must be 'leave_one_out' or 'none' for histories prepared on disk, found 'temporal'")
    check_arguments(split, k_core, 0.1, 0.1, validation_users)
    check_column_names(column_names, event_columns)
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir must be a folder that is empty or does not exist, found {output_dir}")
    request = request_columns(user_column, item_column, timestamp_column, None, event_columns, in_time_order)
    titles = None if items_file is None else read_titles(Path(items_file))
    paths = find_files([source] if isinstance(source, str | os.PathLike) else source, output_dir)
    read = partial(iterate_files, paths, request, column_names, rows_per_batch=ROWS_PER_BATCH)

    cache_dir = output_dir.parent if cache_dir is None else Path(cache_dir)
    with temporary_folder(cache_dir) as folder, temporary_folder(output_dir.parent) as result:
        logger.info(f"reading {paths[0]}" + (f" and {len(paths) - 1:,} more files" if len(paths) > 1 else ""))
        known = survey(read())
        if known.latest is not None:
            warn_of_milliseconds(known.latest)
        logger.info(f"sorting {known.num_rows:,} rows")
        files = partition_rows(read(is_reported=False), known, folder)
        partitions = [Partition(file, known.item_ids) for file in files]
        num_duplicates = sum(partition.num_duplicates for partition in partitions)
        warn_of_duplicates(num_duplicates)
        logger.info(f"filtering {known.num_rows - num_duplicates:,} rows")
        num_filtered, num_filtered_users, rows_of_items = filter_partitions(
            partitions, k_core, 1 if split == "none" else MIN_INTERACTIONS
        )
        logger.info("writing the histories")
        written = _write_histories(result, partitions, rows_of_items > 0, titles, split, validation_users)
        counts = {"num_rows": known.num_rows, "num_duplicates": num_duplicates, "num_filtered": num_filtered}
        counts = {**counts, "num_filtered_users": num_filtered_users, **written}
        settings = {"k_core": k_core, "split": split, "validation_users": validation_users}
        write_preparation(result, settings, [*event_columns], len(partitions), counts)
        os.replace(result, output_dir)
    return counts


def _write_histories(
    folder: Path,
    partitions: Sequence[Partition],
    is_left: np.ndarray,
    titles: pa.Table | None,
    split: str,
    validation_users: int | None,
) -> dict[str, int]:
    """Split the histories, write the shards of every split and the items that are left, and return what the counts say
    of them."""
    lengths = [np.bincount(partition.read_codes()[0]) for partition in partitions]
    lengths = np.concatenate([of_users[of_users > 0] for of_users in lengths])
    prefixes = {"train": (np.arange(lengths.size), lengths)}
    if split == "leave_one_out":
        prefixes = leave_one_out(lengths, validation_users)
    all_train = prefixes["train"]
    if split != "none":
        prefixes["train"] = leave_out_short(all_train)
        warn_of_few_users(prefixes)

    item_ids, indices = partitions[0].item_ids.filter(pa.array(is_left)), np.cumsum(is_left, dtype=np.int32) - 1
    item_counts, num_seen_targets, first_user = np.zeros(len(item_ids), np.int64), 0, 0
    for index, partition in enumerate(partitions):
        interactions = partition.read()
        interactions.user_ids, interactions.users = drop_unused(interactions.user_ids, interactions.users)
        interactions.item_ids, interactions.items = item_ids, indices[interactions.items]
        own_lengths = np.bincount(interactions.users)
        starts, users = np.cumsum(own_lengths) - own_lengths, (first_user, first_user + own_lengths.size)
        item_counts += count_items(interactions, own_lengths, _of_users(all_train, *users))
        if "validation" in prefixes:
            own_targets = _of_users(prefixes["validation"], *users)
            num_seen_targets += count_seen_targets(interactions, own_lengths, own_targets)
        for name, of_all in prefixes.items():
            with_target = name != "train"
            batches = history_batches(interactions, starts, *_of_users(of_all, *users), with_target=with_target)
            schema = history_features(interactions, with_target).arrow_schema
            write_shard(folder, name, index, schema, batches)
        first_user += own_lengths.size

    if titles is not None:
        title_ids, codes = encode_ids(titles["item"])
        titles = first_titles(codes, title_ids, titles["title"])
    write_items(folder, item_rows(item_ids, item_counts, titles))
    return {
        "num_users": lengths.size,
        "num_items": len(item_ids),
        "num_interactions": int(lengths.sum()),
        **{f"num_{name}_users": rows.size for name, (rows, _) in prefixes.items()},
        **({"num_seen_targets": num_seen_targets} if "validation" in prefixes else {}),
    }


def _of_users(prefixes: Prefixes, first: int, end: int) -> Prefixes:
    """Return those of the users from `first` to `end`, counted from `first`."""
    rows, lengths = prefixes
    own = slice(*np.searchsorted(rows, (first, end)))
    return rows[own] - first, lengths[own]
