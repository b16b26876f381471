"""From a column of ids to dense codes, so that every later step is a NumPy operation on integers; and event columns,
each in one piece and one type."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


# The ids of a text file. Whether they are integers is decided when all of them are known.
TEXT_ID = pa.dictionary(pa.int32(), pa.string())
# An integer as Python would write it, or as a float of the same value: 10, 10.0.
INTEGER = r"^(0|-?[1-9]\d*)(\.0+)?$"


def encode_ids(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Return the distinct ids, sorted, as int64 or strings, and each row's index among them."""
    encoded = join_dictionaries(column if column.type == TEXT_ID else column.dictionary_encode())
    ids, codes = encoded.dictionary, encoded.indices.to_numpy()
    if column.type == TEXT_ID:
        merged = integers_if_written_as_such(ids).dictionary_encode()
        ids, codes = merged.dictionary, merged.indices.to_numpy()[codes]
    elif ids.type != pa.int64():
        ids = ids.cast(pa.string())
    order = pc.sort_indices(ids)
    ranks = np.empty(len(ids), np.int32)
    ranks[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    return ids.take(order), ranks[codes]


def encode_events(column: pa.ChunkedArray) -> pa.Array:
    """Return an event column in one piece: text as the integers, numbers or booleans that it all stands for, if it
    does, and what there are few of as a dictionary."""
    if column.type == TEXT_ID:
        encoded = join_dictionaries(column)
        types = (pa.int64(), pa.float64(), pa.bool_(), pa.string())
        values = next(cast for type_ in types if (cast := cast_if_all(encoded.dictionary, type_)) is not None)
        return pa.DictionaryArray.from_arrays(encoded.indices, values)
    if pa.types.is_large_string(column.type):
        return join_dictionaries(column.cast(pa.string()).dictionary_encode())
    return pa.concat_arrays(column.chunks)


def decode_events(values: pa.Array) -> pa.Array:
    """Return what is left of an event column without a dictionary."""
    return values.dictionary.take(values.indices) if pa.types.is_dictionary(values.type) else values


def cast_if_all(text: pa.Array, type_: pa.DataType) -> pa.Array | None:
    """Return strings as values of a type, if each of them is one."""
    try:
        return text.cast(type_)
    except pa.ArrowInvalid:
        return None


def join_dictionaries(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Return the chunks of a column as one, over one dictionary."""
    joined = column.unify_dictionaries().combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def integers_if_written_as_such(ids: pa.Array) -> pa.Array:
    """Turn strings into integers if every one of them is written as an integer of at most 64 bits."""
    if not pc.all(pc.match_substring_regex(ids, INTEGER)).as_py():
        return ids
    try:
        return pc.replace_substring_regex(ids, r"\.0+$", "").cast(pa.int64())
    except pa.ArrowInvalid:
        return ids


def drop_unused(ids: pa.Array, codes: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Return the ids that a row has, and each row's index among them."""
    used = np.bincount(codes, minlength=len(ids)) > 0
    return ids.filter(pa.array(used)), (np.cumsum(used, dtype=np.int32) - 1)[codes]
