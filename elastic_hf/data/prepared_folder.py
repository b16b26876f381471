"""A folder of prepared histories: Parquet shards of every split, the items, and how they were made.

train/00000.parquet, ...   a row per user, as in [`~histories.Histories`]; also validation and test
items.parquet              a row per item
preparation.json           the settings, and what became of the rows
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset


PREPARATION_FILE = "preparation.json"
ITEMS_FILE = "items.parquet"
SPLITS = {"leave_one_out": ("train", "validation", "test"), "none": ("train",)}


def write_shard(
    folder: Path, split: str, index: int, schema: pa.Schema, batches: Iterable[dict[str, pa.Array]]
) -> None:
    """Write the rows of a split that one partition has, a row group for each batch."""
    (folder / split).mkdir(exist_ok=True)
    with pq.ParquetWriter(folder / split / f"{index:05d}.parquet", schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch(batch, schema=schema))


def write_items(folder: Path, items: pa.Table) -> None:
    pq.write_table(items, folder / ITEMS_FILE, compression="zstd")


def write_preparation(
    folder: Path, settings: dict[str, Any], event_columns: Sequence[str], num_shards: int, counts: dict[str, int]
) -> None:
    """Write how the histories were made; without it a folder is not taken for a prepared one."""
    known = {"settings": settings, "event_columns": event_columns, "num_shards": num_shards, "counts": counts}
    (folder / PREPARATION_FILE).write_text(json.dumps(known, indent=2) + "\n")


def is_prepared(source: Any) -> bool:
    """Return whether a source is a folder of prepared histories."""
    return isinstance(source, str | os.PathLike) and Path(source, PREPARATION_FILE).is_file()


def load_prepared(
    folder: Path,
    reading: dict[str, Any],
    settings: dict[str, Any],
    event_columns: Sequence[str],
    streaming: bool,
    cache_dir: str | os.PathLike | None,
) -> tuple[DatasetDict | IterableDatasetDict, Dataset, dict[str, int]]:
    """
    Return the splits, memory-mapped or as streams, the items and the counts.

    Args:
        folder (`Path`): The folder.
        reading (`dict`): Arguments of how rows are read, which prepared histories have behind them: all must be None.
        settings (`dict`): Arguments of how histories are filtered and split, which must be those they were made with.
        event_columns (`Sequence[str]`): Those of the event columns to load.
        streaming (`bool`): Whether the splits are streams.
        cache_dir (`str` or `os.PathLike`, *optional*): Where the Arrow files of memory-mapped splits are kept.

    Raises:
        ValueError: if one of the arguments would make other histories.
    """
    for name, value in reading.items():
        if value is not None:
            raise ValueError(f"{name} must not be given for {folder}, which is prepared already, found {value!r}")
    prepared = json.loads((folder / PREPARATION_FILE).read_text())
    for name, value in settings.items():
        if value != prepared["settings"][name]:
            raise ValueError(
                f"{name} must be {prepared['settings'][name]!r}, with which {folder} was prepared, found {value!r}"
            )
    there = prepared["event_columns"]
    for name in event_columns:
        if name not in there:
            raise ValueError(
                f"event_columns must be of those with which {folder} was prepared, {', '.join(there) or None}, found "
                f"{name!r}"
            )
    left_out = {*there} - {*event_columns}
    histories = IterableDatasetDict() if streaming else DatasetDict()
    for name in SPLITS[prepared["settings"]["split"]]:
        shards = [str(folder / name / f"{index:05d}.parquet") for index in range(prepared["num_shards"])]
        columns = [column for column in pq.read_schema(shards[0]).names if column not in left_out]
        histories[name] = load_dataset(
            "parquet",
            data_files={name: shards},
            split=name,
            columns=columns,
            streaming=streaming,
            cache_dir=cache_dir,
        )
    return histories, Dataset.from_parquet(str(folder / ITEMS_FILE), cache_dir=cache_dir), prepared["counts"]
