"""Training histories cut into rows: windows of a model's input, or prefixes, one for each item to predict."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


# Histories that are cut at once: the prefixes of one are up to max_length times as long as it.
WINDOWED_AT_ONCE, PREFIXED_AT_ONCE = 1_000, 100


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
    columns = [name for name in ("input_ids", "timestamps", *event_columns) if name in histories.column_names]
    return _split(histories, max_length, max_length, columns, WINDOWED_AT_ONCE)


def split_into_prefixes(histories: Dataset, max_length: int, columns: Sequence[str] = ()) -> Dataset:
    """
    Cut each history into all its prefixes, so that each item but the first is the last of a row once: what is also
    called data augmentation.

    Each row has one target, its last item: the collator's objective `"last_item"`. Models whose positions see the
    whole row can learn no more from it. Causal models learn as many targets from whole histories in fewer steps; here
    each target has a dropout of its own, which helps where histories are short.

    A history of n items gives n - 1 rows, oldest first, of the `max_length + 1` most recent items of each prefix of at
    least two items; a history of a single item is a row as it is.

    The rows are written out, to the disk where `histories` are there: up to `max_length` token ids of 4 bytes for each
    interaction, and as many values of each other column. So they are exact, once each in an epoch, and of known
    lengths, which batches are grouped by; a row that refers to its history would spare the space, and be no row that
    other tools can read.

    Args:
        histories (`datasets.Dataset`): Training rows with `input_ids` and `columns`.
        max_length (`int`): Number of items a model sees.
        columns (`Sequence[str]`, *optional*):
            What a model reads beside the items, cut in the same places: `timestamps` and event columns.

    Returns:
        `datasets.Dataset`: The prefixes, with `input_ids` and `columns` alone.

    Raises:
        ValueError: if a column is missing.
    """
    kept = ["input_ids", *columns]
    if not {*kept} <= {*histories.column_names}:
        raise ValueError(
            f"histories must have the columns {', '.join(kept)}, found {', '.join(histories.column_names)}"
        )
    return _split(histories.select_columns(kept), max_length, 1, kept, PREFIXED_AT_ONCE)


def _split(histories: Dataset, max_length: int, step: int, columns: list[str], batch_size: int) -> Dataset:
    """Cut `columns` of each history at its end and every `step` items before it, as long as a row has two items."""
    return (
        histories.with_format("arrow")
        .map(
            _split_batch,
            fn_kwargs={"max_length": max_length, "step": step, "columns": columns},
            batched=True,
            batch_size=batch_size,
            load_from_cache_file=False,  # a damaged file of the cache would be taken for the result
            desc="Cutting histories",
        )
        .with_format(histories.format["type"])
    )


def _split_batch(table: pa.Table, max_length: int, step: int, columns: list[str]) -> pa.Table:
    histories = table["input_ids"].combine_chunks()
    lengths = pc.list_value_length(histories).to_numpy()
    num_rows = np.maximum(1, -(-(lengths - 1) // step))
    rows = np.repeat(np.arange(len(lengths)), num_rows)
    rows_after = np.repeat(np.cumsum(num_rows), num_rows) - 1 - np.arange(len(rows))
    ends = lengths[rows] - rows_after * step
    starts = np.maximum(0, ends - max_length - 1)

    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    first_items = np.cumsum(lengths) - lengths
    items = np.repeat(first_items[rows] + starts - offsets[:-1], ends - starts) + np.arange(offsets[-1])
    cut = table.take(pa.array(rows))
    for name in columns:
        values = table[name].combine_chunks().flatten().take(pa.array(items))
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
        cut = cut.set_column(table.column_names.index(name), name, column)
    return cut
