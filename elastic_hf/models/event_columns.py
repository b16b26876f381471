"""Event columns: what a log knows of its events beside item and time, from its values to the numbers a model reads.

    strings, booleans, integers of few values -> categories: 1, 2, ... in order; 0 for any other value, and for none
    all other numbers                         -> (value - mean) / standard deviation; 0 for none

What is known of a column is learned once, from training events, and is either `{"categories": [...]}` or
`{"mean": ..., "deviation": ...}`.
"""

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


MAX_INTEGERS = 100  # distinct integers that are categories; more are numbers
MAX_CATEGORIES = 10_000
# Which kinds of values a column of a type takes; text stands for what it is written as.
TAKEN = {
    pa.bool_(): ("booleans", "strings"),
    pa.int64(): ("integers", "numbers", "strings"),
    pa.string(): ("strings", "integers"),
    pa.float64(): ("integers", "numbers", "strings"),
}


def learn_event_column(name: str, values: pa.Array | pa.ChunkedArray) -> dict[str, Any]:
    """Return what is known of an event column.

    Args:
        name (`str`): of the column, as errors call it.
        values (`pyarrow.Array` or `pyarrow.ChunkedArray`): of all training events, null where there is none.

    Returns:
        `dict`: the sorted `categories`, or the `mean` and the `deviation` of the numbers, 1 where they are all equal.

    Raises:
        ValueError: if there is no value at all, if they are neither strings, booleans nor finite numbers, or if there
            are more than 10,000 categories.
    """
    kind = _kind(values.type)
    if values.null_count == len(values):
        raise ValueError(f"event column {name!r} must have a value in the training events, found none")
    if kind is None:
        raise ValueError(
            f"event column {name!r} must hold strings, booleans, integers or numbers, found type {values.type}"
        )
    distinct = pc.drop_null(pc.unique(values))
    if kind == "numbers" or (kind == "integers" and len(distinct) > MAX_INTEGERS):
        numbers = _finite(name, values.cast(pa.float64()))
        deviation = pc.stddev(numbers).as_py()
        if not math.isfinite(deviation):
            raise ValueError(f"event column {name!r} must hold numbers with a finite deviation, found {deviation}")
        return {"mean": pc.mean(numbers).as_py(), "deviation": deviation if deviation > 0 else 1.0}
    if len(distinct) > MAX_CATEGORIES:
        raise ValueError(
            f"event column {name!r} must have at most {MAX_CATEGORIES:,} categories, found {len(distinct):,}"
        )
    return {"categories": sorted(distinct.to_pylist())}


def encode_event_column(name: str, values: pa.Array, known: dict[str, Any]) -> pa.Array:
    """Return the categories or the standardised numbers of a column's values.

    Args:
        name (`str`): of the column, as errors call it.
        values (`pyarrow.Array`): of events, null where there is none.
        known (`dict`): as [`learn_event_column`] returns it.

    Returns:
        `pyarrow.FloatArray`: as many numbers, 0 for what is unknown or missing.

    Raises:
        ValueError: if the values are of another kind than those that were learned, or not finite.
    """
    if "mean" in known:
        numbers = _finite(name, _cast(name, values, pa.float64()))
        encoded = pc.divide(pc.subtract(numbers, known["mean"]), known["deviation"])
    else:
        categories = pa.array(known["categories"])
        encoded = pc.add(pc.index_in(_cast(name, values, categories.type), value_set=categories), 1)
    return pc.fill_null(encoded, 0).cast(pa.float32())


def encode_event_lists(
    name: str, lists: pa.Array, known: dict[str, Any], num_items: pa.Array, first_row: int = 0
) -> pa.ListArray:
    """Return what [`encode_event_column`] makes of lists, one for each history.

    Args:
        name (`str`): of the column, as errors call it.
        lists (`pyarrow.ListArray`): of B histories.
        known (`dict`): as [`learn_event_column`] returns it.
        num_items (`pyarrow.Array` of shape `(B,)`): how many items each history has.
        first_row (`int`, defaults to 0): the number of the first history, in errors.

    Raises:
        ValueError: if a history has more or fewer values than items, and as [`encode_event_column`]; the message names
            the row, from 0.
    """
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise ValueError(f"event column {name!r} must hold lists, found type {lists.type}")
    lengths = pc.fill_null(pc.list_value_length(lists), -1)
    differ = pc.indices_nonzero(pc.not_equal(lengths, num_items))
    if len(differ):
        row = differ[0].as_py()
        found = "none" if lengths[row].as_py() < 0 else lengths[row]
        raise ValueError(
            f"event column {name!r} must have as many values as items, {num_items[row]} in row {first_row + row}, "
            f"found {found}"
        )
    values, offsets = lists.flatten(), pc.subtract(lists.offsets, lists.offsets[0]).cast(pa.int32())
    try:
        encoded = encode_event_column(name, values, known)
    except ValueError as error:
        for row in range(len(lists)):
            try:
                encode_event_column(name, lists[row].values, known)
            except ValueError as of_row:
                raise ValueError(f"{of_row} in row {first_row + row}") from error
        raise
    return pa.ListArray.from_arrays(offsets, encoded)


def _kind(type_: pa.DataType) -> str | None:
    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_boolean(type_):
        return "booleans"
    if pa.types.is_integer(type_):
        return "integers"
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "numbers"
    is_string = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    return "strings" if is_string else None


def _cast(name: str, values: pa.Array, type_: pa.DataType) -> pa.Array:
    """The values in a column's own type, of which they must be."""
    if pa.types.is_null(values.type):
        return values.cast(type_)
    expected = {pa.float64(): "numbers", pa.int64(): "integers", pa.bool_(): "booleans"}.get(type_, "strings")
    if _kind(values.type) not in TAKEN[type_]:
        raise ValueError(f"event column {name!r} must hold {expected}, found type {values.type}")
    try:
        return values.cast(type_)
    except pa.ArrowInvalid as error:
        raise ValueError(f"event column {name!r} must hold {expected}, found other values: {error}") from error


def _finite(name: str, numbers: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    wrong = numbers.filter(pc.invert(pc.is_finite(numbers)))
    if len(wrong):
        raise ValueError(f"event column {name!r} must hold finite numbers, found {wrong[0]}")
    return numbers
