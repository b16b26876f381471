"""Histories longer than a model's input, cut into windows of it."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def split_into_windows(histories: Dataset, max_length: int, event_columns: Sequence[str] = ()) -> Dataset:
    """
    Cut histories that are longer than a model's input into windows, so that each item but the first is a target once.

    A history of n items gives `ceil((n - 1) / max_length)` rows of at most `max_length + 1` items, oldest first. Each
    begins with the last item of the one before it; only the oldest may be shorter than the others.

    Args:
        histories (`datasets.Dataset`):
            Training rows with `input_ids` and, cut in the same places, `timestamps` and `event_columns`; other columns
            are repeated for each window.
        max_length (`int`): Number of items a model sees.
        event_columns (`Sequence[str]`, *optional*): Those of the tokenizer.

    Returns:
        `datasets.Dataset`: The windows, with the columns of `histories`.
    """
    return (
        histories.with_format("arrow")
        .map(
            _split_batch,
            fn_kwargs={"max_length": max_length, "event_columns": [*event_columns]},
            batched=True,
            load_from_cache_file=False,  # a damaged file of the cache would be taken for the result
            desc="Cutting long histories",
        )
        .with_format(histories.format["type"])
    )


def _split_batch(table: pa.Table, max_length: int, event_columns: list[str]) -> pa.Table:
    histories = table["input_ids"].combine_chunks()
    lengths = pc.list_value_length(histories).to_numpy()
    num_windows = np.maximum(1, -(-(lengths - 1) // max_length))
    rows = np.repeat(np.arange(len(lengths)), num_windows)
    windows_after = np.repeat(np.cumsum(num_windows), num_windows) - 1 - np.arange(len(rows))
    ends = lengths[rows] - windows_after * max_length
    starts = np.maximum(0, ends - max_length - 1)

    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    first_items = np.cumsum(lengths) - lengths
    items = np.repeat(first_items[rows] + starts - offsets[:-1], ends - starts) + np.arange(offsets[-1])
    windows = table.take(pa.array(rows))
    for name in ("input_ids", "timestamps", *event_columns):
        if name in table.column_names:
            values = table[name].combine_chunks().flatten().take(pa.array(items))
            column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
            windows = windows.set_column(table.column_names.index(name), name, column)
    return windows
