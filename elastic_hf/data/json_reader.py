"""Read JSON Lines files: one object per line, of which the columns that are wanted are read and no others."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import pyarrow as pa
import pyarrow.json

from .columns import Columns
from .files import open_bytes, open_text


logger = logging.getLogger(__name__)

NUM_SAMPLED_LINES = 1_000  # they tell which columns there are, and of which types
ARROW_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}


class JsonReader:
    """
    The rows of one JSON Lines file.

    Attributes:
        names (`list[str]`): The columns in the file's first lines.
        is_empty (`bool`): Whether the file has no object at all.
    """

    in_time_order = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_empty = True
        self.types: dict[str, type] = {}  # of the first value of each column
        for _, row in itertools.islice(self._rows(), NUM_SAMPLED_LINES):
            self.is_empty = False
            self.types.update({name: type(row[name]) for name in row if self.types.get(name, NoneType) is NoneType})
        self.names = list(self.types)

    def read(self, columns: Columns) -> pa.Table:
        """Return the columns that the file has."""
        names = [name for name in columns.wanted() if name in self.names]
        schema = pa.schema({name: ARROW_TYPES.get(self.types[name], pa.string()) for name in names})
        options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            with open_bytes(self.path) as file:
                table = pa.json.read_json(file, parse_options=options).select(names)
            table.validate(full=True)  # the strings, too
            return table
        except pa.ArrowInvalid as error:
            logger.info(f"{self.path} is read line by line: {error}")
        return self._read_lines(names)

    def position(self, row: int) -> str:
        with open_text(self.path) as file:
            lines = (number for number, line in enumerate(file, start=1) if line.strip())
            return f"line {next(itertools.islice(lines, row, None))}"

    def _rows(self) -> Iterator[tuple[int, dict]]:
        """Yield the number and the object of each line that is not blank."""
        with open_text(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    message = getattr(error, "msg", str(error))
                    raise ValueError(
                        f"{self.path}, line {number}: expected one JSON object per line: {message}"
                    ) from None
                if not isinstance(row, dict):
                    found = line.strip()[:100]
                    raise ValueError(f"{self.path}, line {number}: expected one JSON object per line, found {found!r}")
                yield number, row

    def _read_lines(self, names: list[str]) -> pa.Table:
        """Read the columns in Python: slowly, but with the line of what is wrong."""
        columns = {name: [] for name in names}
        first = {}  # the kind of each column's first value, and its line
        for number, row in self._rows():
            for name, values in columns.items():
                value = row.get(name)
                values.append(value)
                if value is None:
                    continue
                kind = _kind(value)
                first_kind, line = first.setdefault(name, (kind, number))
                if kind is None or kind != first_kind:
                    expected = f"{first_kind} as on line {line}" if kind else "a 64-bit number or text in UTF-8"
                    raise ValueError(f"{self.path}, line {number}: {name} is {value!r}, expected {expected}")
        try:
            return pa.table(columns)
        except pa.ArrowInvalid as error:  # integers among fractions that no float64 holds
            raise ValueError(f"{self.path}: {error}") from error


def _kind(value: Any) -> str | None:
    """Return what a JSON value is, None if a column of interactions cannot hold it."""
    if isinstance(value, str):
        return "a string" if value.isprintable() or _is_utf_8(value) else None
    if isinstance(value, bool):
        return "a boolean"
    if not isinstance(value, int | float):
        return None
    return "a number" if isinstance(value, float) or -(2**63) <= value < 2**63 else None


def _is_utf_8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
