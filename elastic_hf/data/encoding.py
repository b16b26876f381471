"""From a column of ids to dense codes, so that every later step is a NumPy operation on integers."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .readers import TEXT_ID


def _integers_if_canonical(ids: pa.Array) -> pa.Array:
    """Turn strings into integers if every one of them is written as Python would write the integer."""
    try:
        integers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return integers if integers.cast(ids.type).equals(ids) else ids


def encode_ids(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Return the distinct ids, sorted, and each row's index among them."""
    is_text = column.type == TEXT_ID
    if not is_text:
        column = column.dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    ids = encoded.dictionary
    if is_text:
        ids = _integers_if_canonical(ids)
    elif ids.type != pa.int64():
        ids = ids.cast(pa.string())
    order = pc.sort_indices(ids)
    ranks = np.empty(len(ids), np.int32)
    ranks[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    return ids.take(order), ranks[encoded.indices.to_numpy()]


def drop_unused(ids: pa.Array, codes: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    used = np.bincount(codes, minlength=len(ids)) > 0
    return ids.filter(pa.array(used)), (np.cumsum(used, dtype=np.int32) - 1)[codes]
