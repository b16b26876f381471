"""From the values of columns, as people write them, to ids, Unix seconds and features of events."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import EVENT_PREFIX, Columns
from .encoding import TEXT_ID, cast_if_all, join_dictionaries


LARGEST_EXACT_FLOAT = 2.0**53
DATE = r"^\d{4}-\d{2}-\d{2}([T ].*)?$"
NUMBER = r"^-?\d+(\.\d*)?([eE][+-]?\d+)?$"
SCIENTIFIC = r"^-?\d(\.\d+)?[eE]\+\d+$"  # as spreadsheets and pandas write large numbers
UTC = r" ?([+-]00:?00)? ?(UTC|GMT|[Zz])$"
TIME_ZONE = r"[T ].*(Z|[+-]\d{2}(:?\d{2})?)$"


def check_rows(table: pa.Table, columns: Columns, source: str | Path, position: Callable[[int], str]) -> pa.Table:
    """
    Check the rows of a source and rename its columns to `user`, `item`, `timestamp` and `title`; the names of event
    columns get a prefix.

    Args:
        table (`pyarrow.Table`): The source's columns, of any type.
        columns (`Columns`): Their names.
        source (`str` or `Path`): The source's name in messages.
        position (`Callable[[int], str]`): From a row's index to the words that tell a reader where it is.

    Returns:
        `pyarrow.Table`: ids as int64, strings or `TEXT_ID`, timestamps as int64 or float64, titles as strings or
        `TEXT_ID`, event columns as bool, int64, float64, strings or `TEXT_ID`.

    Raises:
        ValueError: if a value is missing or is not what its column holds; the message names the row.
    """
    checked = {}
    for role, name in columns.roles.items():
        column = _Column(table[name], name, source, position)
        convert = {"timestamp": column.to_seconds, "title": column.to_titles}.get(role, column.to_ids)
        checked[role] = convert()
    for name in columns.events:
        checked[EVENT_PREFIX + name] = _Column(table[name], name, source, position).to_events()
    return pa.table(checked)


class _Column:
    """One column, with what it takes to say where a value of it is wrong."""

    def __init__(self, values: pa.ChunkedArray, name: str, source: str | Path, position: Callable[[int], str]) -> None:
        self.values, self.name, self.source, self.position = values, name, source, position

    def to_ids(self) -> pa.ChunkedArray:
        self._reject(self.values.is_null(), "a value")
        if self.values.type == TEXT_ID:
            self._check_text_ids()
            return self.values
        values = self._decode()
        if pa.types.is_large_string(values.type):
            self._reject(pc.equal(values, ""), "a value")
            return values
        if pa.types.is_floating(values.type):
            self._reject(pc.greater(pc.abs(values), LARGEST_EXACT_FLOAT), "an integer that a float holds exactly")
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            return self._cast(values, pa.int64(), "an integer of at most 64 bits, or a string")
        raise self._wrong_type("integers or strings")

    def to_titles(self) -> pa.ChunkedArray:
        if self.values.type == TEXT_ID:
            return self.values
        values = self._decode()
        if not (pa.types.is_large_string(values.type) or pa.types.is_integer(values.type)):
            raise self._wrong_type("strings")
        return values.cast(pa.large_string())

    def to_events(self) -> pa.ChunkedArray:
        """Return categories or finite numbers, null where there is none; what text stands for is not decided here."""
        if self.values.type == TEXT_ID:
            encoded = join_dictionaries(self.values)
            if (numbers := cast_if_all(encoded.dictionary, pa.float64())) is not None:
                self._reject(_not_finite(numbers.take(encoded.indices)), "a finite number")
            return self.values
        values = self._decode()
        if pa.types.is_decimal(values.type):
            values = values.cast(pa.float64())
        if pa.types.is_floating(values.type):
            self._reject(_not_finite(values), "a finite number")
        elif pa.types.is_integer(values.type):
            values = self._cast(values, pa.int64(), "an integer of at most 64 bits")
        elif not (
            pa.types.is_large_string(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)
        ):
            raise self._wrong_type("strings, booleans, integers or numbers")
        return values

    def to_seconds(self) -> pa.ChunkedArray:
        """Return Unix seconds as int64, or as float64 where the values are floats or have fractions of a second."""
        self._reject(self.values.is_null(), "a value")
        values = self._decode()
        if pa.types.is_large_string(values.type):
            values = self._parse_timestamps(values)
        elif pa.types.is_date(values.type):
            values = values.cast(pa.timestamp("s"))
        elif pa.types.is_integer(values.type):
            values = self._cast(values, pa.int64(), "an integer of at most 64 bits")
        elif pa.types.is_decimal(values.type):
            values = _cast_to_first(values, pa.int64(), pa.float64())
        if pa.types.is_timestamp(values.type):
            ticks_per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
            ticks = values.cast(pa.int64()).to_numpy()
            seconds, fractions = np.divmod(ticks, ticks_per_second)
            if np.any(fractions):
                seconds = seconds + fractions / ticks_per_second
        elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            seconds = values.to_numpy()
        else:
            raise self._wrong_type("numbers, dates, datetimes or ISO 8601 strings")
        self._reject(~(np.isfinite(seconds) & (seconds >= 0)), "a finite timestamp of at least 0 Unix seconds")
        return pa.chunked_array([seconds])

    def _decode(self) -> pa.ChunkedArray:
        """Return the values without a dictionary, all kinds of strings as one and all kinds of floats as one."""
        values = self.values
        if pa.types.is_dictionary(values.type):
            values = pa.chunked_array([_take_from_dictionary(chunk) for chunk in values.chunks])
        if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
            return self._cast(values, pa.large_string(), "text in UTF-8")
        if pa.types.is_string(values.type) or pa.types.is_string_view(values.type):
            values = values.cast(pa.large_string())
        if pa.types.is_large_string(values.type):  # whoever made it may not have looked at the bytes
            return self._cast(values.cast(pa.large_binary()), pa.large_string(), "text in UTF-8")
        return values.cast(pa.float64()) if pa.types.is_floating(values.type) else values

    def _check_text_ids(self) -> None:
        """Refuse ids over several lines, and numbers of which digits were lost on the way."""
        encoded = join_dictionaries(self.values)
        ids = encoded.dictionary
        self._reject(pc.match_substring_regex(ids, r"[\r\n]").take(encoded.indices), "an id on one line")
        if pc.all(pc.match_substring_regex(ids, NUMBER)).as_py():
            is_float = pc.match_substring(ids, ".")
            too_large = pc.greater(pc.abs(ids.cast(pa.float64())), LARGEST_EXACT_FLOAT)
            has_lost_digits = pc.or_(pc.match_substring_regex(ids, SCIENTIFIC), pc.and_(is_float, too_large))
            self._reject(has_lost_digits.take(encoded.indices), "an integer with all its digits")

    def _parse_timestamps(self, text: pa.ChunkedArray) -> pa.ChunkedArray:
        is_date = pc.match_substring_regex(text, DATE)
        if not is_date[0].as_py():
            is_number = pc.match_substring_regex(text, NUMBER)
            if not is_number[0].as_py():
                raise self._wrong_value(0, "Unix seconds or an ISO 8601 date such as 2024-01-31 or 2024-01-31T09:30Z")
            self._reject(pc.invert(is_number), "Unix seconds as in the first row")
            return _cast_to_first(text, pa.int64(), pa.float64())
        self._reject(pc.invert(is_date), "an ISO 8601 date as in the first row")
        text = pc.replace_substring_regex(text, UTC, "Z")
        text = pc.replace_substring_regex(text, r" ([+-]\d{2}:?\d{2})$", r"\1")
        has_zone = pc.match_substring_regex(text, TIME_ZONE)
        unit = "ns" if pc.any(pc.match_substring_regex(text, r"\.\d{7}")).as_py() else "us"
        expected = "a valid ISO 8601 date, of which a time zone is Z or an offset such as +01:00"
        nothing = pa.scalar(None, text.type)
        zoned = self._cast(pc.if_else(has_zone, text, nothing), pa.timestamp(unit, "UTC"), expected)
        local = self._cast(pc.if_else(has_zone, nothing, text), pa.timestamp(unit), expected)
        return pc.coalesce(zoned.cast(local.type), local)

    def _cast(self, values: pa.ChunkedArray, type_: pa.DataType, expected: str) -> pa.ChunkedArray:
        try:
            return values.cast(type_)
        except pa.ArrowInvalid:
            first, end = 0, len(values)  # the first row that fails is one of these
        while end - first > 1:
            middle = (first + end) // 2
            try:
                values[first:middle].cast(type_)
                first = middle
            except pa.ArrowInvalid:
                end = middle
        raise self._wrong_value(first, expected)

    def _reject(self, is_wrong: np.ndarray | pa.Array | pa.ChunkedArray, expected: str) -> None:
        rows = np.flatnonzero(is_wrong)
        if rows.size:
            raise self._wrong_value(int(rows[0]), expected)

    def _wrong_value(self, row: int, expected: str) -> ValueError:
        value = self.values[row]
        try:
            value = value.as_py()
        except UnicodeDecodeError:
            value = value.as_buffer().to_pybytes()
        return ValueError(f"{self.source}, {self.position(row)}: {self.name} is {value!r}, expected {expected}")

    def _wrong_type(self, expected: str) -> ValueError:
        return ValueError(f"{self.source}: column {self.name!r} must hold {expected}, found type {self.values.type}")


def _not_finite(numbers: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.fill_null(pc.invert(pc.is_finite(numbers)), False)


def _take_from_dictionary(column: pa.DictionaryArray) -> pa.Array:
    ids = column.dictionary
    if pa.types.is_string_view(ids.type):  # which Arrow does not take from
        ids = ids.cast(pa.large_string())
    return ids.take(column.indices)


def _cast_to_first(values: pa.ChunkedArray, *types: pa.DataType) -> pa.ChunkedArray:
    """Return the values in the first of the types that holds them."""
    for type_ in types[:-1]:
        try:
            return values.cast(type_)
        except pa.ArrowInvalid:
            continue
    return values.cast(types[-1])
